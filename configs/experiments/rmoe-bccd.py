# RMoE-D (2204.09636) for detection: a small Swin, from random weights to BCCD.
# The dense checkpoint of rmoe-swin.py is to be given with --dense.
_base_ = '../pipelines/swin-xtiny_bccd-320x240.py'
once = ['dense-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
options = {
    'dense-upstream': bf16,
    'dense-downstream': bf16,
    'rmoe-d-downstream': bf16,
}
