# RMoE (2204.09636) on a small CvT: the four pipelines, from nothing to CamVid.
# Upstream runs take most of the time, so all seeds share them.
_base_ = '../pipelines/cvt-xtiny_camvid-256x256.py'
once = ['dense-upstream', 'moe-upstream', 'rmoe-i-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
options = {
    'dense-upstream': bf16,
    'moe-upstream': bf16,
    'rmoe-i-upstream': bf16,
    'dense-downstream': bf16,
    'moe-downstream': bf16,
    'rmoe-d-downstream': bf16,
    'rmoe-i-downstream': bf16,
}
