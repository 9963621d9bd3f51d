# Experts are divided among eight GPUs, and tokens are sent to the GPU that has
# their expert. All other parameters are divided among all GPUs.
model_wrapper_cfg = dict(type='rmoe.FullySharded', expert_parallel=8)
