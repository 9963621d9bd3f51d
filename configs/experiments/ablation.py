# Measures which choices help RMoE-D and which hurt it. A ViT-Ti with
# ImageNet-21k weights is upcycled and trained on CamVid for 600 iterations
# instead of the 1,000 of its config. 'joint' trains everything from the first
# iteration. The others are 'joint' with one change; 'staged', 'core-joint-e4'
# and 'k2-bpr-0.5' have several. The models with K = 2 are then evaluated at
# many capacities (V-MoE, 2106.05974).
names = ('non-moe', 'core-joint', 'core-joint-e4', 'core-half-joint', 'joint',
         'staged', 'residual-joint', 'balance-0', 'balance-0.001', 'bias-balanced',
         'no-router-noise', 'noise-0.01', 'align-none', 'no-core',
         'residual-lr-0.3', 'residual-lr-3', 'router-lr-0.1', 'e1', 'e2', 'e4',
         'e16', 'k2', 'k2-bpr-0.5', 'rank-4', 'rank-16', 'last-blocks', 'all-blocks',
         'gradient-chosen', 'sinkhorn-token-choice', 'softmax-expert-choice',
         'sinkhorn-expert-choice', 'sparse-expert-choice', 'soft-moe')
pipelines = {name: [name] for name in names}
steps = {
    name: '../vit_moe/vit-tiny-patch16-moe-e8k1-in21k-pre_fcn_1xb4-1k_camvid-256x256.py'
    for name in names
}
steps['non-moe'] = '../vit_moe/vit-tiny-patch16-in21k-pre_fcn_1xb4-1k_camvid-256x256.py'
short = {
    'model.backbone.drop_path_rate': 0.1,
    'optim_wrapper.type': 'rmoe.BFloat16OptimWrapper',
    'param_scheduler.1.end': 600,
    'train_cfg.max_iters': 600,
    'train_cfg.val_interval': 600
}
moe = 'model.backbone.moe.'
losses = [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100)
]
joint = {**short, 'custom_hooks': losses}


def staged(*stages):
    """Options for these stages, after which everything trains."""
    return dict(
        joint,
        custom_hooks=[
            dict(
                type='rmoe.ResidualMoEHook',
                stages=[*stages, dict(name='joint', roles='all')]), *losses
        ])


core_joint = staged(dict(name='core', roles=('core', 'head'), end=0.2))


def router(**settings):
    return {**joint, moe + 'router': dict(type='TokenChoiceRouter', **settings)}


options = {
    'non-moe': short,
    'joint': joint,
    'staged': staged(
        dict(name='core', roles=('core', 'head'), end=0.2),
        dict(
            name='residual', roles=('residual', 'router', 'head'), end=0.4)),
    'core-joint': core_joint,
    # Combines 'core-joint' and 'e4', which are each ahead of 'joint'.
    'core-joint-e4': {**core_joint, moe + 'num_experts': 4},
    'core-half-joint': staged(
        dict(name='core', roles=('core', 'head'), end=0.5)),
    'residual-joint': staged(
        dict(name='residual', roles=('residual', 'router', 'head'), end=0.2)),
    'balance-0': router(loss_weights={}),
    'balance-0.001': router(loss_weights=dict(importance=0.0005, load=0.0005)),
    'bias-balanced': {
        **joint, moe + 'router': dict(type='BiasBalancedRouter'),
        'custom_hooks': [*losses, dict(type='rmoe.BalanceBiasHook')]
    },
    'no-router-noise': router(noise_std=0.0),
    'noise-0.01': joint,
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
    # With one expert the router has nothing to choose, but core and residual
    # are both updated. So what this gains over dense does not come from
    # experts.
    'e1': {**joint, moe + 'num_experts': 1},
    'e2': {**joint, moe + 'num_experts': 2},
    'e4': {**joint, moe + 'num_experts': 4},
    'e16': {**joint, moe + 'num_experts': 16},
    'k2': router(top_k=2),
    # Trained with the capacity that it is used with, which is enough for half
    # of the choices.
    'k2-bpr-0.5': {
        **router(top_k=2, capacity_factor=0.5, priority='bpr'),
        moe + 'unrouted': 'zero'
    },
    'rank-4': {**joint, moe + 'rank': 4},
    'rank-16': {**joint, moe + 'rank': 16},
    'last-blocks': {**joint, moe + 'layers': (9, 10, 11)},
    'all-blocks': {**joint, moe + 'layers': tuple(range(12))},
    # The layers that tools/analysis_tools/select_layers.py --batches 16 chose
    # for 'non-moe' with seed 0.
    'gradient-chosen': {**joint, moe + 'layers': (0, 1, 2)},
    # The other routers of 2401.15969.
    **{
        name: {**joint, moe + 'router': dict(type=f'{kind}Router')}
        for name, kind in {
            'sinkhorn-token-choice': 'SinkhornTokenChoice',
            'softmax-expert-choice': 'ExpertChoice',
            'sinkhorn-expert-choice': 'SinkhornExpertChoice',
            'sparse-expert-choice': 'SparseExpertChoice',
            'soft-moe': 'Soft'
        }.items()
    }
}
# Residuals start as noise, with this fraction of the deviation of the core's
# weights.
upcycle = {'noise-0.01': ['--noise', '0.01']}
analyse = {
    'joint': ['specialisation'],
    'k2': ['capacity_sweep'],
    'k2-bpr-0.5': ['capacity_sweep']
}
