# Parameters, gradients and optimizer moments are divided among all GPUs.
model_wrapper_cfg = dict(type='rmoe.FullySharded')
