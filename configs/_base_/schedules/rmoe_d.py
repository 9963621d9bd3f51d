# RMoE-D: a dense checkpoint, upcycled and fine-tuned on the downstream task.
# A new head and the warm-up meet a dense model; then the residuals learn
# around a still core; then everything trains. The lengths are this project's
# choice: the paper does not give them.
custom_hooks = [
    dict(
        type='rmoe.ResidualMoEHook',
        stages=[
            dict(name='core', roles=('core', 'head'), end=0.2),
            dict(
                name='residual', roles=('residual', 'router', 'head'),
                end=0.4),
            dict(name='joint', roles='all'),
        ]),
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100),
]
