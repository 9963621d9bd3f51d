# After an upstream run of the same backbone; see configs/pipelines.
_base_ = ['./swin-xtiny-patch4-window7_upernet_1xb4-1k_camvid-256x256.py']
model = dict(backbone=dict(window_size=4))
