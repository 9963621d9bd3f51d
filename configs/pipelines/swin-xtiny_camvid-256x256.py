# Swin with half the width of Swin-T, from random weights to CamVid, for two CPU
# cores.
_base_ = '../_base_/pipelines.py'
steps = {
    'dense-upstream': '../swin_moe/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64.py',
    'moe-upstream': '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1-scratch_1xb64-7e_tiny-imagenet-100-64x64.py',
    'rmoe-i-upstream': '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_1xb64-1e-intermediate_tiny-imagenet-100-64x64.py',
    'dense-downstream': '../swin_moe/swin-xtiny-patch4-window4_upernet_1xb4-1k_camvid-256x256.py',
    'moe-downstream': '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1-scratch_upernet_1xb4-1k_camvid-256x256.py',
    'rmoe-d-downstream': '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_upernet_1xb4-1k_camvid-256x256.py',
    'rmoe-i-downstream': '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_upernet_1xb4-1k-rmoe-i_camvid-256x256.py',
}
