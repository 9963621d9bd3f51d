# The intermediate stage of RMoE-I: a short training of an upcycled classifier
# on the upstream data. Its head is trained already, so there is no core stage.
# First the residuals train while the core is frozen, then everything trains.
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
