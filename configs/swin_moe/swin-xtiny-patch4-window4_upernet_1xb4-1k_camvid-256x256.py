# Starts from the upstream run of the same backbone; see configs/pipelines.
_base_ = ['./swin-xtiny-patch4-window7_upernet_1xb4-1k_camvid-256x256.py']
model = dict(backbone=dict(window_size=4))
load_from = 'work_dirs/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64/epoch_7.pth'
