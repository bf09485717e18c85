/* Makes a chosen call that writes below a folder fail, as a full or broken disk does. Preloaded: LD_PRELOAD.
 *
 * FAULTS_BELOW  the folder; calls on other paths are left alone
 * FAULTS_FILE   a part of a path: only calls on such paths are counted
 * FAULTS_KIND   open (to write), write, sync, rename, link, mkdir, truncate or close
 * FAULTS_AT     the number of the call of this kind that fails, from 1, over all processes; 0: none, only count
 * FAULTS_HOW    ENOSPC, EIO, EDQUOT; short: a write takes half of the bytes; full: it takes half, and every later write
 *               fails with ENOSPC
 * FAULTS_ON     1: every later call of this kind fails too
 * FAULTS_COUNTS a file that processes share their counters in
 * FAULTS_LOG    a file that gets a line for each call: kind, number, path
 *
 * A process that was forked after torch's import calls faults_begin() to read the variables anew. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, SYNC, RENAME, LINK, MKDIR, TRUNCATE, CLOSE, KINDS };
static const char *const names[KINDS] = {"open", "write", "sync", "rename", "link", "mkdir", "truncate", "close"};
enum { PASS, FAIL, SHORT };

static char below[PATH_MAX];
static const char *file_part;
static size_t below_length;
static int kind = -1, at, on, error, is_short, is_full, log_fd = -1;
static int own[KINDS], *counts = own;

void faults_begin(void) {
    const char *text = getenv("FAULTS_BELOW");
    below_length = 0;
    kind = -1;
    if (!text || strlen(text) >= sizeof below) return;
    strcpy(below, text);
    file_part = getenv("FAULTS_FILE");
    const char *wanted = getenv("FAULTS_KIND"), *how = getenv("FAULTS_HOW");
    for (int each = 0; each < KINDS; each++)
        if (wanted && !strcmp(wanted, names[each])) kind = each;
    at = getenv("FAULTS_AT") ? atoi(getenv("FAULTS_AT")) : 0;
    on = getenv("FAULTS_ON") != NULL;
    how = how ? how : "ENOSPC";
    is_full = !strcmp(how, "full");
    is_short = !strcmp(how, "short");
    error = !strcmp(how, "EIO") ? EIO : !strcmp(how, "EDQUOT") ? EDQUOT : ENOSPC;
    const char *path = getenv("FAULTS_COUNTS");
    if (path) {
        int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file >= 0 && !syscall(SYS_ftruncate, file, sizeof own)) {
            void *found = mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
            counts = found == MAP_FAILED ? own : found;
        }
        syscall(SYS_close, file);
    }
    path = getenv("FAULTS_LOG");
    log_fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    below_length = strlen(below);
}

__attribute__((constructor)) static void at_load(void) { faults_begin(); }

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
#define NEXT(name) static __typeof__(&name) next_##name; if (!next_##name) next_##name = next(#name)

static int path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return 1;
}

static int absolute(int folder, const char *name, char *path) {
    if (!name) return 0;
    if (name[0] == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, path, PATH_MAX) < 0) return 0;
    } else if (!path_of_fd(folder, path)) return 0;
    size_t length = strlen(path);
    return snprintf(path + length, PATH_MAX - length, "/%s", name) < (int)(PATH_MAX - length);
}

/* Count a call; say whether it fails, and set errno. */
static int judged(int which, const char *path) {
    if (!below_length || strncmp(path, below, below_length) || (path[below_length] != '/' && path[below_length]))
        return PASS;
    if (file_part && !strstr(path + below_length, file_part)) return PASS;
    int number = __atomic_add_fetch(&counts[which], 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s %d %s\n", names[which], number, path + below_length);
        syscall(SYS_write, log_fd, line, size);
    }
    if (which != kind || !at) return PASS;
    if (is_full) {
        errno = ENOSPC;
        return number < at ? PASS : number == at ? SHORT : FAIL;
    }
    if (number != at && !(on && number > at)) return PASS;
    errno = error;
    return is_short ? SHORT : FAIL;
}

static int judged_at(int which, int folder, const char *name) {
    char path[PATH_MAX];
    int before = errno;
    if (!below_length || !absolute(folder, name, path)) return errno = before, PASS;
    int found = judged(which, path);
    if (found != FAIL) errno = before;
    return found;
}

static int judged_fd(int which, int fd) {
    char path[PATH_MAX];
    int before = errno;
    if (!below_length || !path_of_fd(fd, path)) return errno = before, PASS;
    int found = judged(which, path);
    if (found != FAIL) errno = before;
    return found;
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define OPENS(name) int name(const char *path, int flags, ...) { MODE(flags) NEXT(name); \
    return WRITES(flags) && judged_at(OPEN, AT_FDCWD, path) == FAIL ? -1 : next_##name(path, flags, mode); }
#define OPENS_AT(name) int name(int folder, const char *path, int flags, ...) { MODE(flags) NEXT(name); \
    return WRITES(flags) && judged_at(OPEN, folder, path) == FAIL ? -1 : next_##name(folder, path, flags, mode); }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __open_2(const char *path, int flags) { return open(path, flags); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPENS(name) FILE *name(const char *path, const char *mode) { NEXT(name); \
    return (mode[0] != 'r' || strchr(mode, '+')) && judged_at(OPEN, AT_FDCWD, path) == FAIL ? NULL : next_##name(path, mode); }
FOPENS(fopen)
FOPENS(fopen64)

#define HALF(size, found) ((found) == SHORT && (size) > 1 ? (size) / 2 : (size))
ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    int found = judged_fd(WRITE, fd);
    return found == FAIL ? -1 : next_write(fd, data, HALF(size, found));
}
#define PWRITES(name, offset_t) ssize_t name(int fd, const void *data, size_t size, offset_t offset) { NEXT(name); \
    int found = judged_fd(WRITE, fd); \
    return found == FAIL ? -1 : next_##name(fd, data, HALF(size, found), offset); }
PWRITES(pwrite, off_t)
PWRITES(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int number) {
    NEXT(writev);
    int found = judged_fd(WRITE, fd);
    if (found == SHORT && number) return write(fd, parts[0].iov_base, HALF(parts[0].iov_len, SHORT));
    return found == FAIL ? -1 : next_writev(fd, parts, number);
}
ssize_t copy_file_range(int from, off64_t *at_from, int to, off64_t *at_to, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    int found = judged_fd(WRITE, to);
    return found == FAIL ? -1 : next_copy_file_range(from, at_from, to, at_to, HALF(size, found), flags);
}
#define SENDS(name, offset_t) ssize_t name(int to, int from, offset_t *offset, size_t size) { NEXT(name); \
    int found = judged_fd(WRITE, to); \
    return found == FAIL ? -1 : next_##name(to, from, offset, HALF(size, found)); }
extern ssize_t sendfile(int, int, off_t *, size_t);
extern ssize_t sendfile64(int, int, off64_t *, size_t);
SENDS(sendfile, off_t)
SENDS(sendfile64, off64_t)
int posix_fallocate(int fd, off_t offset, off_t size) {
    NEXT(posix_fallocate);
    return judged_fd(WRITE, fd) == FAIL ? errno : next_posix_fallocate(fd, offset, size);
}

int fsync(int fd) { NEXT(fsync); return judged_fd(SYNC, fd) == FAIL ? -1 : next_fsync(fd); }
int fdatasync(int fd) { NEXT(fdatasync); return judged_fd(SYNC, fd) == FAIL ? -1 : next_fdatasync(fd); }
int rename(const char *from, const char *to) {
    NEXT(rename);
    return judged_at(RENAME, AT_FDCWD, to) == FAIL ? -1 : next_rename(from, to);
}
int renameat(int above, const char *from, int folder, const char *to) {
    NEXT(renameat);
    return judged_at(RENAME, folder, to) == FAIL ? -1 : next_renameat(above, from, folder, to);
}
int renameat2(int above, const char *from, int folder, const char *to, unsigned flags) {
    NEXT(renameat2);
    return judged_at(RENAME, folder, to) == FAIL ? -1 : next_renameat2(above, from, folder, to, flags);
}
int link(const char *from, const char *to) {
    NEXT(link);
    return judged_at(LINK, AT_FDCWD, to) == FAIL ? -1 : next_link(from, to);
}
int linkat(int above, const char *from, int folder, const char *to, int flags) {
    NEXT(linkat);
    return judged_at(LINK, folder, to) == FAIL ? -1 : next_linkat(above, from, folder, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    return judged_at(MKDIR, AT_FDCWD, path) == FAIL ? -1 : next_mkdir(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    NEXT(mkdirat);
    return judged_at(MKDIR, folder, path) == FAIL ? -1 : next_mkdirat(folder, path, mode);
}
#define CUTS(name, offset_t) int name(const char *path, offset_t size) { NEXT(name); \
    return judged_at(TRUNCATE, AT_FDCWD, path) == FAIL ? -1 : next_##name(path, size); }
#define CUTS_FD(name, offset_t) int name(int fd, offset_t size) { NEXT(name); \
    return judged_fd(TRUNCATE, fd) == FAIL ? -1 : next_##name(fd, size); }
CUTS(truncate, off_t)
CUTS(truncate64, off64_t)
CUTS_FD(ftruncate, off_t)
CUTS_FD(ftruncate64, off64_t)
int close(int fd) {
    NEXT(close);
    int flags = below_length ? fcntl(fd, F_GETFL) : -1;
    int found = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && !(flags & O_PATH) ? judged_fd(CLOSE, fd) : PASS;
    int why = errno, done = next_close(fd); /* Linux closes it, whatever it returns */
    if (found != FAIL) return done;
    errno = why;
    return -1;
}
