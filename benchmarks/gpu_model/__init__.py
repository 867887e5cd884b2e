"""What a GPU would do in a training or decoding step, on a machine without one.

PyTorch's fake tensors run the project's own code with `device="cuda"` and compute nothing. A trace
of the operations gives the kernels, their types, the bytes that they move, the memory that lives
and the waits for the GPU; rates of a real GPU turn them into an estimate of the time.

    stub         tells a CPU build of PyTorch that there is a GPU
    trace        records the kernels of a piece of code
    steps        the pieces: a training step, a distillation step, a decoded token
    fusion       kernels as `torch.compile` would fuse them
    roofline     time and utilization of the recorded kernels

`python -m benchmarks.gpu_model 340m` prints them. Nothing is imported here, because the stub must
be loaded before PyTorch.
"""
