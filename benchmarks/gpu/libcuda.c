/* A CUDA driver that answers questions and does nothing: enough for the compiler of Mosaic GPU kernels, which asks
 * which chip is there and loads what it made. gpu/assembler.py builds it as libcuda.so.1. */

typedef int Result; /* 0: success */

enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_BYTES = 97 };

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case MULTIPROCESSORS: *value = 132; break;
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    case SHARED_BYTES: *value = 227 * 1024; break; /* that a block may have */
    default: *value = 1;
  }
  return 0;
}

Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuGetErrorString(int error, const char **text) { *text = "no CUDA driver"; return 0; }
Result cuGetErrorName(int error, const char **text) { *text = "no CUDA driver"; return 0; }
