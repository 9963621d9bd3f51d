# Experts and all other parameters train together from the first iteration. This
# is for a MoE model from scratch, or one whose experts were trained before.
custom_hooks = [
    dict(type='rmoe.MoELossHook'),
    dict(type='rmoe.RoutingStatsHook', interval=100),
]
