/* LD_PRELOAD shim: counts every call that opens or changes something under one folder, and makes the n-th one (or all
 * from the n-th on) fail, stop half way, or kill the process. The calls are logged for the power-loss model.
 * Disarmed until faultio_arm() is called through ctypes in a forked child. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, SHORT_KILL, FAIL_ONCE, FAIL_FROM, SHORT_WRITES };
static char root[4096];
static int mode, error_number, log_file = -1;
static long target, calls;

void faultio_arm(const char *folder, int new_mode, long at, int number, int log) {
    snprintf(root, sizeof root, "%s", folder);
    mode = new_mode, target = at, error_number = number, log_file = log, calls = 0;
}
long faultio_calls(void) { return calls; }

static void note(const char *operation, const char *path, const char *more, const void *data, size_t size) {
    if (log_file < 0) return;
    char *line = malloc(2 * size + 9000);
    int length = sprintf(line, "%s\t%s\t%s", operation, path, more);
    for (size_t i = 0; i < size; i++) length += sprintf(line + length, "%02x", ((const unsigned char *)data)[i]);
    line[length++] = '\n';
    syscall(SYS_write, log_file, line, length);
    free(line);
}
void faultio_mark(const char *text) { note("mark", text, "", NULL, 0); }

static int inside(const char *path) {
    size_t n = strlen(root);
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}
static const char *path_of(int folder, const char *name, char *out) { /* name == NULL: of the descriptor itself */
    char link[64];
    if (name && (name[0] == '/' || folder == AT_FDCWD)) return strcpy(out, name);
    sprintf(link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, out, 4000);
    out[n < 0 ? 0 : n] = 0;
    return name ? strcat(strcat(out, "/"), name) : out;
}
static int refused(const char *path, size_t *size) { /* 1: fail with errno; *size: how much of a write to do */
    if (!root[0] || !inside(path)) return 0;
    long call = calls++;
    if (mode == SHORT_WRITES && size && *size > 1) *size /= 2;
    if (mode == SHORT_KILL && call == target && size) { *size /= 2; return 0; }
    if ((mode == KILL || mode == SHORT_KILL) && call == target) kill(getpid(), SIGKILL);
    if ((mode == FAIL_ONCE && call == target) || (mode == FAIL_FROM && call >= target)) { errno = error_number; return 1; }
    return 0;
}
static void after_write(size_t wanted, size_t size) {
    if (mode == SHORT_KILL && size < wanted) kill(getpid(), SIGKILL);
}

#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))
#define WATCH(path, operation, more, call) do { \
    char buffer[8192]; const char *where = path; (void)buffer; \
    if (refused(where, NULL)) return -1; \
    int result = (call); \
    int before = errno; \
    if (inside(where)) note(result < 0 ? "failed" : operation, where, more, NULL, 0); \
    errno = before; \
    return result; } while (0)

static int do_open(int folder, const char *name, int flags, int permissions) {
    const char *more = flags & O_TRUNC ? "trunc" : flags & O_CREAT ? "create" : "read";
    WATCH(path_of(folder, name, buffer), "open", more, syscall(SYS_openat, folder, name, flags, permissions));
}
#define PERMISSIONS va_list list; va_start(list, flags); int permissions = va_arg(list, int); va_end(list)
int open(const char *name, int flags, ...) { PERMISSIONS; return do_open(AT_FDCWD, name, flags, permissions); }
int open64(const char *name, int flags, ...) { PERMISSIONS; return do_open(AT_FDCWD, name, flags, permissions); }
int openat(int folder, const char *name, int flags, ...) { PERMISSIONS; return do_open(folder, name, flags, permissions); }
int openat64(int folder, const char *name, int flags, ...) { PERMISSIONS; return do_open(folder, name, flags, permissions); }

static ssize_t do_write(int file, const void *data, size_t size, off_t at) { /* at < 0: at the file's position */
    char buffer[8192];
    const char *path = root[0] ? path_of(file, NULL, buffer) : "";
    size_t allowed = size;
    if (refused(path, &allowed)) return -1;
    ssize_t done = at < 0 ? syscall(SYS_write, file, data, allowed) : syscall(SYS_pwrite64, file, data, allowed, at);
    if (done >= 0 && inside(path)) { note(at < 0 ? "write" : "pwrite", path, "", data, done); after_write(size, allowed); }
    return done;
}
ssize_t write(int file, const void *data, size_t size) { return do_write(file, data, size, -1); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { return do_write(file, data, size, at); }
ssize_t pwrite64(int file, const void *data, size_t size, off_t at) { return do_write(file, data, size, at); }
ssize_t writev(int file, const struct iovec *parts, int num) { return num ? do_write(file, parts->iov_base, parts->iov_len, -1) : 0; }

DIR *opendir(const char *path) {
    if (refused(path, NULL)) return NULL;
    if (inside(path)) note("list", path, "", NULL, 0);
    return REAL(DIR *(*)(const char *), "opendir")(path);
}
int fsync(int file) { WATCH(path_of(file, NULL, buffer), "fsync", "", syscall(SYS_fsync, file)); }
int fdatasync(int file) { WATCH(path_of(file, NULL, buffer), "fsync", "", syscall(SYS_fdatasync, file)); }
int ftruncate64(int file, off_t size) { WATCH(path_of(file, NULL, buffer), "truncate", "", syscall(SYS_ftruncate, file, size)); }
int mkdir(const char *path, mode_t bits) { WATCH(path, "mkdir", "", REAL(int (*)(const char *, mode_t), "mkdir")(path, bits)); }
int mkdirat(int at, const char *p, mode_t bits) { WATCH(path_of(at, p, buffer), "mkdir", "", syscall(SYS_mkdirat, at, p, bits)); }
int rename(const char *from, const char *to) { WATCH(from, "rename", to, REAL(int (*)(const char *, const char *), "rename")(from, to)); }
int unlink(const char *path) { WATCH(path, "unlink", "", REAL(int (*)(const char *), "unlink")(path)); }
int rmdir(const char *path) { WATCH(path, "unlink", "", REAL(int (*)(const char *), "rmdir")(path)); }
int unlinkat(int at, const char *p, int flags) { WATCH(path_of(at, p, buffer), "unlink", "", syscall(SYS_unlinkat, at, p, flags)); }
