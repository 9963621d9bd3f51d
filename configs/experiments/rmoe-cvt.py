# RMoE (2204.09636) on a small CvT: the four pipelines, from nothing to CamVid.
# Upstream runs take most of the time, so all seeds share them.
_base_ = '../pipelines/cvt-xtiny_camvid-256x256.py'
once = ['dense-upstream', 'moe-upstream', 'rmoe-i-upstream']
bf16 = {'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper'}
# Half of the configs' iterations: a new head that learns five times as fast
# makes up for it.
short = {
    **bf16, 'optim_wrapper.paramwise_cfg.roles.head': dict(lr_mult=5.0),
    'param_scheduler.1.end': 500,
    'train_cfg.max_iters': 500,
    'train_cfg.val_interval': 500
}
options = {
    'dense-upstream': bf16,
    'moe-upstream': bf16,
    'rmoe-i-upstream': bf16,
    'dense-downstream': short,
    'moe-downstream': short,
    'rmoe-d-downstream': short,
    'rmoe-i-downstream': short,
}
