# What helps RMoE-D, or hurts it: one change at a time to experts that train
# with everything else from the first iteration ('joint'), on the model and
# schedule of rmoe-swin.py, whose dense checkpoint all start from (--dense).
pipelines = {
    name: ['dense-upstream', name]
    for name in (
        'joint', 'core-joint', 'residual-joint', 'balance-0', 'balance-0.001',
        'bias-balanced', 'no-router-noise', 'noise-0.01', 'noise-0.1',
        'align-none', 'no-core', 'residual-lr-0.3', 'residual-lr-3',
        'router-lr-0.1', 'e2', 'e4', 'e16', 'k2', 'rank-4', 'rank-16',
        'last-blocks', 'all-blocks', 'gradient-chosen')
}
steps = {
    name: '../swin_moe/swin-xtiny-patch4-window4-moe-e8k1_upernet_1xb4-1k_camvid-256x256.py'
    for name in pipelines
}
steps['dense-upstream'] = '../swin_moe/swin-xtiny-patch4-window4_1xb64-7e_tiny-imagenet-100-64x64.py'
moe = 'model.backbone.moe.'
losses = [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100)
]
joint = {
    'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper',
    'custom_hooks': losses
}


def staged(name, *roles):
    """A fifth of the run for these roles, then all."""
    return dict(
        joint,
        custom_hooks=[
            dict(
                type='rmoe.ResidualMoEHook',
                stages=[
                    dict(name=name, roles=roles, end=0.2),
                    dict(name='joint', roles='all')
                ]), *losses
        ])


def router(**settings):
    return {**joint, moe + 'router': dict(type='TokenChoiceRouter', **settings)}


options = {
    'joint': joint,
    'core-joint': staged('core', 'core', 'head'),
    'residual-joint': staged('residual', 'residual', 'router', 'head'),
    'balance-0': router(loss_weights={}),
    'balance-0.001': router(loss_weights=dict(importance=0.0005, load=0.0005)),
    'bias-balanced': {
        **joint, moe + 'router': dict(type='BiasBalancedRouter'),
        'custom_hooks': [*losses, dict(type='rmoe.BalanceBiasHook')]
    },
    'no-router-noise': router(noise_std=0.0),
    'noise-0.01': joint,
    'noise-0.1': joint,
    'align-none': {**joint, moe + 'align': 'none'},
    'no-core': {**joint, moe + 'core': False},
    'residual-lr-0.3': {
        **joint,
        'optim_wrapper.paramwise_cfg.roles.residual': dict(lr_mult=0.3)
    },
    'residual-lr-3': {
        **joint,
        'optim_wrapper.paramwise_cfg.roles.residual': dict(lr_mult=3.0)
    },
    'router-lr-0.1': {
        **joint,
        'optim_wrapper.paramwise_cfg.roles.router.lr_mult': 0.1
    },
    'e2': {**joint, moe + 'num_experts': 2},
    'e4': {**joint, moe + 'num_experts': 4},
    'e16': {**joint, moe + 'num_experts': 16},
    'k2': router(top_k=2),
    'rank-4': {**joint, moe + 'rank': 4},
    'rank-16': {**joint, moe + 'rank': 16},
    'last-blocks': {**joint, moe + 'layers': ((), (), (4, 5), (0, 1))},
    'all-blocks': {
        **joint, moe + 'layers': ((0, 1), (0, 1), (0, 1, 2, 3, 4, 5), (0, 1))
    },
    # What tools/analysis_tools/select_layers.py --batches 16 chose for the
    # dense model of rmoe-swin.py, seed 0, after its CamVid run.
    'gradient-chosen': {**joint, moe + 'layers': ((0, 1), (0, ), (0, ), ())},
}
# Residuals as noise, of this deviation over the core's weights.
upcycle = {
    'noise-0.01': ['--noise', '0.01'],
    'noise-0.1': ['--noise', '0.1']
}
