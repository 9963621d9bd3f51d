# Experts are divided among eight GPUs, to which their tokens travel; all else
# among all GPUs.
model_wrapper_cfg = dict(type='rmoe.FullySharded', expert_parallel=8)
