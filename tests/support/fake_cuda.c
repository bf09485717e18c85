/* A driver library of the shape of NVIDIA's libcuda.so.1, on which cuInit ends with an error: -DCODE=804. */
#include <string.h>
#include <unistd.h>
static int init(unsigned flags) { (void)flags; return CODE; }
static int version(int *to) { *to = 12040; return 0; }
static int other(void) { return CODE; }
int cuGetProcAddress_v2(const char *name, void **to, int cuda, unsigned long long flags, int *status);
static void *address(const char *name) {
  if (!strcmp(name, "cuInit")) return (void *)init;
  if (!strcmp(name, "cuDriverGetVersion")) return (void *)version;
  if (!strcmp(name, "cuGetProcAddress")) return (void *)cuGetProcAddress_v2;
  return (void *)other;
}
int cuGetProcAddress_v2(const char *name, void **to, int cuda, unsigned long long flags, int *status) {
  (void)cuda; (void)flags;
  *to = address(name);
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char *name, void **to, int cuda, unsigned long long flags) { return cuGetProcAddress_v2(name, to, cuda, flags, 0); }
int cuInit(unsigned flags) { return init(flags); }
int cuDriverGetVersion(int *to) { return version(to); }
