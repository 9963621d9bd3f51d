# CvT-13 on ImageNet-1k, then with UPerNet on ADE20K.
_base_ = '../_base_/pipelines.py'
steps = {
    'dense-upstream': '../cvt_moe/cvt-13_8xb128-300e_in1k-224x224.py',
    'moe-upstream': '../cvt_moe/cvt-13-moe-e8k1-scratch_8xb128-300e_in1k-224x224.py',
    'rmoe-i-upstream': '../cvt_moe/cvt-13-moe-e8k1_8xb128-30e-intermediate_in1k-224x224.py',
    'dense-downstream': '../cvt_moe/cvt-13-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'moe-downstream': '../cvt_moe/cvt-13-moe-e8k1-scratch_upernet_8xb2-160k_ade20k-512x512.py',
    'rmoe-d-downstream': '../cvt_moe/cvt-13-moe-e8k1-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'rmoe-i-downstream': '../cvt_moe/cvt-13-moe-e8k1-in1k-pre_upernet_8xb2-160k-rmoe-i_ade20k-512x512.py',
}
