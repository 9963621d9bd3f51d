# RMoE-I, intermediate: an upcycled classifier, short, on the upstream data.
# Its head is trained already, so there is no core stage: the residuals learn
# around a still core, then everything trains.
custom_hooks = [
    dict(
        type='rmoe.ResidualMoEHook',
        stages=[
            dict(
                name='residual', roles=('residual', 'router', 'head'),
                end=0.5),
            dict(name='joint', roles='all'),
        ]),
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100),
]
