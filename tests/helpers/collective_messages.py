"""Error messages of NCCL and gloo, word for word."""

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
DUPLICATE = NCCL + (
    "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000\n"
)
FULL = NCCL + (
    "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-2hXk8u (size 9637888), error: No space left "
    "on device (28)"
)
GONE = NCCL + (
    "remote process exited or there was a network error, NCCL version 2.28.9\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketPollConnect: connect to 10.0.0.2<41234> returned Connection refused, exceeded error retry count"
)
SILENT = (
    NCCL
    + "unhandled cuda error, NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = GLOO + "pair.cc:537] Connection closed by peer [10.0.0.2]:37. This is typically caused by a remote worker"
RESET = GLOO + "pair.cc:545] Read error [10.0.0.2]:37: Connection reset by peer. This is typically caused by"
SLOW = GLOO + "unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete"
UNREACHABLE = f"Gloo connectFullMesh failed with {GLOO}pair.cc:144] no error"
