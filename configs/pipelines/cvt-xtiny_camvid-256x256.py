# CvT with half the width of CvT-13, from random weights to CamVid, for two CPU
# cores.
_base_ = '../_base_/pipelines.py'
steps = {
    'dense-upstream': '../cvt_moe/cvt-xtiny_1xb64-7e_tiny-imagenet-100-64x64.py',
    'moe-upstream': '../cvt_moe/cvt-xtiny-moe-e8k1-scratch_1xb64-7e_tiny-imagenet-100-64x64.py',
    'rmoe-i-upstream': '../cvt_moe/cvt-xtiny-moe-e8k1_1xb64-1e-intermediate_tiny-imagenet-100-64x64.py',
    'dense-downstream': '../cvt_moe/cvt-xtiny_upernet_1xb4-1k_camvid-256x256.py',
    'moe-downstream': '../cvt_moe/cvt-xtiny-moe-e8k1-scratch_upernet_1xb4-1k_camvid-256x256.py',
    'rmoe-d-downstream': '../cvt_moe/cvt-xtiny-moe-e8k1_upernet_1xb4-1k_camvid-256x256.py',
    'rmoe-i-downstream': '../cvt_moe/cvt-xtiny-moe-e8k1_upernet_1xb4-1k-rmoe-i_camvid-256x256.py',
}
