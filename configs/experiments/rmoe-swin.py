# RMoE (2204.09636) with a small Swin: the four pipelines, from random weights
# to CamVid. Upstream runs take most of the time, so all seeds share them. A
# fifth pipeline has a stage in which residuals train while the core is frozen.
_base_ = '../pipelines/swin-xtiny_camvid-256x256.py'
pipelines = {
    'rmoe-d-three-stages': ['dense-upstream', 'rmoe-d-three-stages-downstream']
}
steps = {
    'rmoe-d-three-stages-downstream': '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_upernet_1xb4-1k_camvid-256x256.py'
}
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
    'rmoe-d-three-stages-downstream': {
        **bf16, 'custom_hooks': [
            dict(
                type='rmoe.ResidualMoEHook',
                stages=[
                    dict(name='core', roles=('core', 'head'), end=0.2),
                    dict(
                        name='residual',
                        roles=('residual', 'router', 'head'),
                        end=0.4),
                    dict(name='joint', roles='all'),
                ]),
            dict(type='rmoe.MoELossHook'),
            dict(type='rmoe.RoutingStatsHook', interval=100)
        ]
    }
}
