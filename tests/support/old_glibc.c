/* Answers confstr(_CS_GNU_LIBC_VERSION) as an old C library does. Compiled by test_doctor.py. */
#include <string.h>
#include <unistd.h>
size_t confstr(int name, char *to, size_t size) {
  const char *answer = name == _CS_GNU_LIBC_VERSION ? "glibc 2.17" : "";
  if (size) { strncpy(to, answer, size - 1); to[size - 1] = 0; }
  return strlen(answer) + 1;
}
