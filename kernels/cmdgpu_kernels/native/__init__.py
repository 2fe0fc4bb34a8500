"""The compiled kernels of the CPU: one C++ source, a library per instruction set, loaded by ctypes."""
