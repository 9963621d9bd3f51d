# The pipelines of RMoE (2204.09636): chains of steps, each of which starts
# from the checkpoint of the step before.
pipelines = {
    'non-moe': ['dense-upstream', 'dense-downstream'],
    'moe': ['moe-upstream', 'moe-downstream'],
    'rmoe-d': ['dense-upstream', 'rmoe-d-downstream'],
    'rmoe-i': ['dense-upstream', 'rmoe-i-upstream', 'rmoe-i-downstream'],
}
