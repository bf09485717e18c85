/* A driver library of the shape of NVIDIA's libnvidia-ml.so.1: GPUs as the macros say. Compiled by test_doctor.py. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifndef LOST
#define LOST 0 /* what the driver answers about its GPUs */
#endif
#ifndef MEMORY
#define MEMORY 0 /* and about their memory */
#endif
int nvmlInitWithFlags(unsigned flags) { (void)flags; return INIT; }
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "not supported"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { strncpy(to, DRIVER, size); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *to) { *to = CUDA; return 0; }
int nvmlDeviceGetCount_v2(unsigned *to) { *to = COUNT; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **to) { *to = (void *)(size_t)(index + 1); return LOST; }
int nvmlDeviceGetName(void *gpu, char *to, unsigned size) { (void)gpu; strncpy(to, "Test GPU", size); return 0; }
int nvmlDeviceGetUUID(void *gpu, char *to, unsigned size) { (void)gpu; strncpy(to, "GPU-whole", size); return 0; }
struct memory { unsigned long long total, free, used; };
int nvmlDeviceGetMemoryInfo(void *gpu, struct memory *to) { (void)gpu; to->total = 24000000000ULL; to->used = USED; to->free = to->total - to->used; return MEMORY; }
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) { (void)gpu; *major = MAJOR; *minor = MINOR; return 0; }
int nvmlDeviceGetEccMode(void *gpu, unsigned *now, unsigned *later) { (void)gpu; *now = *later = 1; return 0; }
int nvmlDeviceGetPersistenceMode(void *gpu, unsigned *to) { (void)gpu; *to = 0; return 0; }
struct process { unsigned pid; unsigned long long memory; unsigned instance, compute; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned *count, struct process *to) {
  (void)gpu;
  if (PROCESSES > 0 && *count == 0) { *count = PROCESSES; return 7; /* NVML_ERROR_INSUFFICIENT_SIZE */ }
  *count = PROCESSES;
  for (unsigned index = 0; index < PROCESSES; index++) { to[index].pid = 4242 + index; to[index].memory = 21000000000ULL; }
  return 0;
}
int nvmlDeviceGetP2PStatus(void *one, void *other, int what, int *to) { (void)one; (void)other; (void)what; *to = P2P; return 0; }
/* GPU-whole is the first; MIG-slice is a slice of one, whose sensors say nothing: NVML_ERROR_NOT_SUPPORTED. */
int nvmlDeviceGetHandleByUUID(const char *uuid, void **to) {
  *to = (void *)(size_t)(strcmp(uuid, "MIG-slice") ? 1 : 2);
  return !strcmp(uuid, "GPU-whole") || !strcmp(uuid, "MIG-slice") ? 0 : 6; /* NVML_ERROR_NOT_FOUND */
}
struct utilization { unsigned gpu, memory; };
int nvmlDeviceGetUtilizationRates(void *gpu, struct utilization *to) { to->gpu = 87; to->memory = 40; return gpu == (void *)1 ? 0 : 3; }
int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned *to) { (void)sensor; *to = 71; return gpu == (void *)1 ? 0 : 3; }
int nvmlDeviceGetPowerUsage(void *gpu, unsigned *to) { *to = 299500; return gpu == (void *)1 ? 0 : 3; }
