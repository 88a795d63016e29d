// What is compiled and loaded to see whether a GPU takes kernels at all.
extern "C" __global__ void probe_kernel() {}
