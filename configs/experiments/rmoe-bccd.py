# RMoE-D (2204.09636) on detection: a small Swin, from nothing to BCCD. Give
# it the dense checkpoint of rmoe-swin.py: --dense.
_base_ = '../pipelines/swin-xtiny_bccd-320x240.py'
once = ['dense-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
options = {
    'dense-upstream': bf16,
    'dense-downstream': bf16,
    'rmoe-d-downstream': bf16,
}
