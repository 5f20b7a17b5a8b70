/* System calls that fail on demand: preloaded before the C library, steered from Python (see tests/fault_shim.py).
 *
 * A call is counted when it is named by the fault, concerns a path below one of the fault's folders, and is at least as
 * large as it says. From the `at`-th counted call on, `times` calls do what the fault says. All else is passed on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define FOLDERS 8
#define LOGGED 65536

/* Keep in the order of fault_shim.py's ACTIONS and CALLS. */
enum action { PASS, FAIL, SHORT, END, KILL, KILL_AFTER, TORN, CALL_BACK };
enum call {
    OPEN, READ, WRITE, SYNC, RESIZE, RENAME, LINK, UNLINK, MKDIR, RMDIR, STAT, LIST, MAP, LOCK, COPY, CLOSE, ALLOCATE,
    THREAD, CALLS
};

struct fault {
    unsigned calls; /* bits of enum call */
    long at, times;
    int action, error;
    size_t larger;
    int folders;
    char folder[FOLDERS][1024];
    void (*back)(void);
};

static struct fault fault;
static atomic_int armed;
static atomic_long counted, fired;
static unsigned char logged[LOGGED];
static __thread int inside;

EXPORT void fault_disarm(void) { atomic_store(&armed, 0); }
EXPORT long fault_counted(void) { return atomic_load(&counted); }
EXPORT long fault_fired(void) { return atomic_load(&fired); }
/* Which call the `n`-th counted one was, from 0. */
EXPORT int fault_logged(long n) { return n < LOGGED ? logged[n] : -1; }

EXPORT void fault_arm(unsigned calls, long at, long times, int action, int error, size_t larger, const char *folders,
                      void (*back)(void))
{
    atomic_store(&armed, 0);
    memset(&fault, 0, sizeof fault);
    fault.calls = calls, fault.at = at, fault.times = times, fault.action = action, fault.error = error;
    fault.larger = larger, fault.back = back;
    for (const char *from = folders; *from && fault.folders < FOLDERS;) {
        const char *end = strchr(from, '\n');
        size_t n = end ? (size_t)(end - from) : strlen(from);
        if (n < sizeof fault.folder[0])
            memcpy(fault.folder[fault.folders++], from, n);
        from += n + (end != NULL);
    }
    atomic_store(&counted, 0);
    atomic_store(&fired, 0);
    atomic_store(&armed, 1);
}

static int below(const char *path)
{
    for (int i = 0; i < fault.folders; i++) {
        size_t n = strlen(fault.folder[i]);
        if (!strncmp(path, fault.folder[i], n) && (!path[n] || path[n] == '/'))
            return 1;
    }
    return 0;
}

static int fd_below(int fd)
{
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, path, sizeof path - 1);
    if (n <= 0)
        return 0;
    path[n] = 0;
    return below(path);
}

static int path_below(int dir, const char *path)
{
    char name[64], full[8192];
    if (!path)
        return 0;
    if (path[0] == '/')
        return below(path);
    if (!path[0])
        return fd_below(dir);
    if (dir == AT_FDCWD)
        strcpy(name, "/proc/self/cwd");
    else
        snprintf(name, sizeof name, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(name, full, 4000);
    if (n <= 0 || strlen(path) > 4000)
        return 0;
    full[n] = '/';
    strcpy(full + n + 1, path);
    return below(full);
}

/* What this counted call is to do. */
static int verdict(enum call call)
{
    long n = atomic_fetch_add(&counted, 1);
    if (n < LOGGED)
        logged[n] = (unsigned char)call;
    if (n < fault.at || (fault.times && n >= fault.at + fault.times))
        return PASS;
    atomic_fetch_add(&fired, 1);
    if (fault.action == KILL)
        kill(getpid(), SIGKILL);
    if (fault.action == CALL_BACK && fault.back) {
        inside++;
        fault.back();
        inside--;
        return PASS;
    }
    return fault.action;
}

#define WANTED(call) (atomic_load_explicit(&armed, memory_order_relaxed) && !inside && (fault.calls & (1u << (call))))
#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int judged_fd(enum call call, int fd, size_t size)
{
    if (!WANTED(call) || size < fault.larger)
        return PASS;
    int saved = errno, mine = fd_below(fd);
    errno = saved;
    return mine ? verdict(call) : PASS;
}

static int judged(enum call call, int dir, const char *path)
{
    if (!WANTED(call))
        return PASS;
    int saved = errno, mine = path_below(dir, path);
    errno = saved;
    return mine ? verdict(call) : PASS;
}

static void killed_after(int action)
{
    if (action == KILL_AFTER || action == TORN)
        kill(getpid(), SIGKILL);
}

/* A call without bytes: it fails, or the process dies behind it. */
#define PLAIN(result, name, judge, parameters, arguments) \
    EXPORT result name parameters \
    { \
        REAL(name); \
        int action = judge; \
        if (action == FAIL) { errno = fault.error; return (result)-1; } \
        result made = real arguments; \
        killed_after(action); \
        return made; \
    }

/* A call that moves bytes: besides, it may move half of them, or none as at the end of a file. */
#define MOVING(name, call, fd, size, parameters, arguments, half) \
    EXPORT ssize_t name parameters \
    { \
        REAL(name); \
        int action = judged_fd(call, fd, size); \
        if (action == FAIL) { errno = fault.error; return -1; } \
        if (action == END) return 0; \
        if ((action == SHORT || action == TORN) && (size) > 1) { \
            ssize_t made = real half; \
            killed_after(action); \
            return made; \
        } \
        ssize_t made = real arguments; \
        killed_after(action); \
        return made; \
    }

static size_t total(const struct iovec *v, int n)
{
    size_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += v[i].iov_len;
    return sum;
}

MOVING(read, READ, fd, n, (int fd, void *to, size_t n), (fd, to, n), (fd, to, n / 2))
MOVING(pread, READ, fd, n, (int fd, void *to, size_t n, off_t at), (fd, to, n, at), (fd, to, n / 2, at))
MOVING(pread64, READ, fd, n, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at), (fd, to, n / 2, at))
MOVING(readv, READ, fd, total(v, c), (int fd, const struct iovec *v, int c), (fd, v, c), (fd, v, c > 1 ? c / 2 : c))
MOVING(preadv2, READ, fd, total(v, c), (int fd, const struct iovec *v, int c, off_t at, int flags), (fd, v, c, at, flags),
       (fd, v, c > 1 ? c / 2 : c, at, flags))
MOVING(preadv64v2, READ, fd, total(v, c), (int fd, const struct iovec *v, int c, off64_t at, int flags),
       (fd, v, c, at, flags), (fd, v, c > 1 ? c / 2 : c, at, flags))
MOVING(write, WRITE, fd, n, (int fd, const void *from, size_t n), (fd, from, n), (fd, from, n / 2))
MOVING(pwrite, WRITE, fd, n, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at), (fd, from, n / 2, at))
MOVING(pwrite64, WRITE, fd, n, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at), (fd, from, n / 2, at))
MOVING(writev, WRITE, fd, total(v, c), (int fd, const struct iovec *v, int c), (fd, v, c), (fd, v, c > 1 ? c / 2 : c))
MOVING(pwritev2, WRITE, fd, total(v, c), (int fd, const struct iovec *v, int c, off_t at, int flags),
       (fd, v, c, at, flags), (fd, v, c > 1 ? c / 2 : c, at, flags))
MOVING(pwritev64v2, WRITE, fd, total(v, c), (int fd, const struct iovec *v, int c, off64_t at, int flags),
       (fd, v, c, at, flags), (fd, v, c > 1 ? c / 2 : c, at, flags))
MOVING(copy_file_range, COPY, to, n, (int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags),
       (from, a, to, b, n, flags), (from, a, to, b, n / 2, flags))
MOVING(sendfile, COPY, to, n, (int to, int from, off_t *at, size_t n), (to, from, at, n), (to, from, at, n / 2))
MOVING(sendfile64, COPY, to, n, (int to, int from, off64_t *at, size_t n), (to, from, at, n), (to, from, at, n / 2))

PLAIN(int, fsync, judged_fd(SYNC, fd, fault.larger), (int fd), (fd))
PLAIN(int, fdatasync, judged_fd(SYNC, fd, fault.larger), (int fd), (fd))
PLAIN(int, ftruncate, judged_fd(RESIZE, fd, fault.larger), (int fd, off_t n), (fd, n))
PLAIN(int, ftruncate64, judged_fd(RESIZE, fd, fault.larger), (int fd, off64_t n), (fd, n))
PLAIN(int, truncate, judged(RESIZE, AT_FDCWD, path), (const char *path, off_t n), (path, n))
PLAIN(int, truncate64, judged(RESIZE, AT_FDCWD, path), (const char *path, off64_t n), (path, n))
PLAIN(int, rename, judged(RENAME, AT_FDCWD, a), (const char *a, const char *b), (a, b))
PLAIN(int, renameat, judged(RENAME, x, a), (int x, const char *a, int y, const char *b), (x, a, y, b))
PLAIN(int, link, judged(LINK, AT_FDCWD, b), (const char *a, const char *b), (a, b))
PLAIN(int, linkat, judged(LINK, y, b), (int x, const char *a, int y, const char *b, int flags), (x, a, y, b, flags))
PLAIN(int, symlink, judged(LINK, AT_FDCWD, b), (const char *a, const char *b), (a, b))
PLAIN(int, symlinkat, judged(LINK, x, b), (const char *a, int x, const char *b), (a, x, b))
PLAIN(int, unlink, judged(UNLINK, AT_FDCWD, path), (const char *path), (path))
PLAIN(int, unlinkat, judged(UNLINK, x, path), (int x, const char *path, int flags), (x, path, flags))
PLAIN(int, mkdir, judged(MKDIR, AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
PLAIN(int, mkdirat, judged(MKDIR, x, path), (int x, const char *path, mode_t mode), (x, path, mode))
PLAIN(int, rmdir, judged(RMDIR, AT_FDCWD, path), (const char *path), (path))
PLAIN(int, stat, judged(STAT, AT_FDCWD, path), (const char *path, struct stat *to), (path, to))
PLAIN(int, stat64, judged(STAT, AT_FDCWD, path), (const char *path, struct stat64 *to), (path, to))
PLAIN(int, lstat, judged(STAT, AT_FDCWD, path), (const char *path, struct stat *to), (path, to))
PLAIN(int, lstat64, judged(STAT, AT_FDCWD, path), (const char *path, struct stat64 *to), (path, to))
PLAIN(int, fstat, judged_fd(STAT, fd, fault.larger), (int fd, struct stat *to), (fd, to))
PLAIN(int, fstat64, judged_fd(STAT, fd, fault.larger), (int fd, struct stat64 *to), (fd, to))
PLAIN(int, flock, judged_fd(LOCK, fd, fault.larger), (int fd, int how), (fd, how))

/* It gives the error itself, not -1. */
#define RESERVES(name, offset) \
    EXPORT int name(int fd, offset at, offset n) \
    { \
        REAL(name); \
        int action = judged_fd(RESIZE, fd, fault.larger); \
        if (action == FAIL) return fault.error; \
        int made = real(fd, at, n); \
        killed_after(action); \
        return made; \
    }
RESERVES(posix_fallocate, off_t)
RESERVES(posix_fallocate64, off64_t)

/* It gives the error itself, not -1, and counts whatever the folders. */
EXPORT int pthread_create(pthread_t *to, const pthread_attr_t *how, void *(*work)(void *), void *with)
{
    REAL(pthread_create);
    if (WANTED(THREAD) && verdict(THREAD) == FAIL)
        return fault.error;
    return real(to, how, work, with);
}

EXPORT int close(int fd)
{
    REAL(close);
    int action = judged_fd(CLOSE, fd, fault.larger);
    /* As Linux does it: the descriptor is gone, whatever close says. */
    int made = real(fd);
    killed_after(action);
    if (action == FAIL) { errno = fault.error; return -1; }
    return made;
}

#define OPENS(name) \
    EXPORT int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int action = judged(OPEN, AT_FDCWD, path); \
        if (action == FAIL) { errno = fault.error; return -1; } \
        int made = real(path, flags, mode); \
        killed_after(action); \
        return made; \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    EXPORT int name(int dir, const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int action = judged(OPEN, dir, path); \
        if (action == FAIL) { errno = fault.error; return -1; } \
        int made = real(dir, path, flags, mode); \
        killed_after(action); \
        return made; \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define GIVES(result, name, judge, failed, parameters, arguments) \
    EXPORT result name parameters \
    { \
        REAL(name); \
        int action = judge; \
        if (action == FAIL) { errno = fault.error; return failed; } \
        result made = real arguments; \
        killed_after(action); \
        return made; \
    }
GIVES(FILE *, fopen, judged(OPEN, AT_FDCWD, path), NULL, (const char *path, const char *mode), (path, mode))
GIVES(FILE *, fopen64, judged(OPEN, AT_FDCWD, path), NULL, (const char *path, const char *mode), (path, mode))
/* The type of a directory stream is not needed. */
EXPORT void *opendir(const char *path)
{
    static void *(*real)(const char *);
    if (!real) real = (void *(*)(const char *))dlsym(RTLD_NEXT, "opendir");
    int action = judged(LIST, AT_FDCWD, path);
    if (action == FAIL) { errno = fault.error; return NULL; }
    return real(path);
}

/* Of maps only those of files below the folders, and memory without a file, which counts as an allocation. */
static int judged_map(size_t size, int flags, int fd)
{
    if (flags & MAP_ANONYMOUS) {
        if (!WANTED(ALLOCATE) || size < fault.larger)
            return PASS;
        return verdict(ALLOCATE);
    }
    return judged_fd(MAP, fd, size);
}
GIVES(void *, mmap, judged_map(n, flags, fd), MAP_FAILED, (void *to, size_t n, int prot, int flags, int fd, off_t at),
      (to, n, prot, flags, fd, at))
GIVES(void *, mmap64, judged_map(n, flags, fd), MAP_FAILED, (void *to, size_t n, int prot, int flags, int fd, off64_t at),
      (to, n, prot, flags, fd, at))

/* glibc's own entries: dlsym may allocate itself. */
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static int refused(size_t size)
{
    if (!WANTED(ALLOCATE) || size < fault.larger || verdict(ALLOCATE) != FAIL)
        return 0;
    errno = ENOMEM;
    return 1;
}
EXPORT void *malloc(size_t n) { return refused(n) ? NULL : __libc_malloc(n); }
EXPORT void *calloc(size_t k, size_t n) { return refused(k * n) ? NULL : __libc_calloc(k, n); }
EXPORT void *realloc(void *p, size_t n) { return refused(n) ? NULL : __libc_realloc(p, n); }
EXPORT void *memalign(size_t align, size_t n) { return refused(n) ? NULL : __libc_memalign(align, n); }
EXPORT void *aligned_alloc(size_t align, size_t n) { return refused(n) ? NULL : __libc_memalign(align, n); }
EXPORT int posix_memalign(void **to, size_t align, size_t n)
{
    if (refused(n))
        return ENOMEM;
    void *made = __libc_memalign(align, n);
    if (!made)
        return ENOMEM;
    *to = made;
    return 0;
}
