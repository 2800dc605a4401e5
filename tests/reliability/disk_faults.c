/* Loaded before libc (LD_PRELOAD), it counts what a process asks of the disk and makes one of these
 * requests the last, or a failure. Only what lies under FAULTS_ROOT counts. All processes of a tree
 * share one count, in the file FAULTS_CONTROL; their operations are listed in FAULTS_TRACE.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
    int64_t count;   /* operations so far */
    int64_t at;      /* the operation to disturb, from 1; 0: none */
    int32_t action;  /* SIGNAL, TEAR or FAIL */
    int32_t value;   /* the signal, or errno */
    int32_t lasting; /* whether later operations fail as well */
    int32_t hit;     /* how many were disturbed */
};
enum { SIGNAL = 1, TEAR = 2, FAIL = 3 };

static struct control *control;
static const char *root;
static size_t root_length;
static int trace = -1;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL"), *log = getenv("FAULTS_TRACE");
    root = getenv("FAULTS_ROOT");
    if (!path || !root) return;
    root_length = strlen(root);
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return;
    void *map = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (map != MAP_FAILED) control = map;
    if (log) trace = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
}

static int inside(const char *path) {
    return strncmp(path, root, root_length) == 0 &&
           (path[root_length] == '/' || path[root_length] == 0);
}

static int path_of(int file, char *found) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, found, PATH_MAX - 1);
    if (length < 0) return 0;
    found[length] = 0;
    return 1;
}

/* The absolute path of (directory, name); 0 if it is not under the root. */
static int watched_at(int directory, const char *name, char *found) {
    if (!control || !name) return 0;
    if (name[0] == '/') {
        snprintf(found, PATH_MAX, "%s", name);
    } else if (directory == AT_FDCWD) {
        if (syscall(SYS_getcwd, found, PATH_MAX) < 0) return 0;
        size_t length = strlen(found);
        snprintf(found + length, PATH_MAX - length, "/%s", name);
    } else {
        if (!path_of(directory, found)) return 0;
        size_t length = strlen(found);
        snprintf(found + length, PATH_MAX - length, "/%s", name);
    }
    return inside(found);
}

static int watched(int file, char *found) {
    return control && path_of(file, found) && inside(found);
}

/* Which operations an error can befall: a full disk deletes, a forbidden one has open files. */
static int applies(const char *what) {
    int removes = !strcmp(what, "unlink") || !strcmp(what, "rmdir");
    int names = removes || !strcmp(what, "open") || !strcmp(what, "mkdir") ||
                !strcmp(what, "rename") || !strcmp(what, "chmod");
    switch (control->value) {
    case ENOSPC: return !removes && strcmp(what, "chmod");
    case EACCES: return names;
    case EROFS: return names || !strcmp(what, "truncate");
    default: return 1;
    }
}

/* Count an operation. Returns 0 to go on, 1 to fail with errno set, 2 to write half and die. */
static int disturbed(const char *what, const char *path, const char *other) {
    int saved = errno;
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", (long)number, what, path, other);
        syscall(SYS_write, trace, line, length);
    }
    errno = saved;
    if (!control->at || number < control->at) return 0;
    if (control->action == FAIL) {
        int first = __atomic_load_n(&control->hit, __ATOMIC_SEQ_CST) == 0;
        if (!(first || control->lasting) || !applies(what)) return 0;
        __atomic_add_fetch(&control->hit, 1, __ATOMIC_SEQ_CST);
        errno = control->value;
        return 1;
    }
    if (number != control->at) return 0;
    __atomic_add_fetch(&control->hit, 1, __ATOMIC_SEQ_CST);
    if (control->action == TEAR) return 2;
    syscall(SYS_kill, 0, control->value); /* the whole process group */
    errno = saved;
    return 0;
}

static void die(void) {
    syscall(SYS_kill, 0, SIGKILL);
    for (;;) pause();
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define CHECK(what, path, other) \
    switch (disturbed(what, path, other)) { case 1: return -1; case 2: die(); }

#define WRITES(name, parameters, whole, half) \
    ssize_t name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (watched(file, path)) switch (disturbed("write", path, "")) { \
            case 1: return -1; \
            case 2: half; die(); \
        } \
        return whole; \
    }

WRITES(write, (int file, const void *data, size_t size), real(file, data, size),
       real(file, data, size / 2))
WRITES(pwrite, (int file, const void *data, size_t size, off_t at), real(file, data, size, at),
       real(file, data, size / 2, at))
WRITES(pwrite64, (int file, const void *data, size_t size, off64_t at),
       real(file, data, size, at), real(file, data, size / 2, at))
WRITES(writev, (int file, const struct iovec *parts, int count), real(file, parts, count),
       real(file, parts, count / 2))

ssize_t copy_file_range(int in, off64_t *from, int file, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    char path[PATH_MAX];
    if (watched(file, path)) switch (disturbed("write", path, "")) {
        case 1: return -1;
        case 2: real(in, from, file, to, size / 2, flags); die();
    }
    return real(in, from, file, to, size, flags);
}

ssize_t sendfile(int file, int in, off_t *from, size_t size) {
    REAL(sendfile);
    char path[PATH_MAX];
    if (watched(file, path)) switch (disturbed("write", path, "")) {
        case 1: return -1;
        case 2: real(file, in, from, size / 2); die();
    }
    return real(file, in, from, size);
}

ssize_t sendfile64(int file, int in, off64_t *from, size_t size) {
    return sendfile(file, in, (off_t *)from, size);
}

#define ON_FILE(name, what, parameters, call) \
    int name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (watched(file, path)) CHECK(what, path, ""); \
        return call; \
    }

ON_FILE(fsync, "fsync", (int file), real(file))
ON_FILE(fdatasync, "fsync", (int file), real(file))
ON_FILE(ftruncate, "truncate", (int file, off_t size), real(file, size))
ON_FILE(ftruncate64, "truncate", (int file, off64_t size), real(file, size))
ON_FILE(fchmod, "chmod", (int file, mode_t mode), real(file, mode))

#define ON_PATH(name, what, parameters, directory, call) \
    int name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (watched_at(directory, name_, path)) CHECK(what, path, ""); \
        return call; \
    }

ON_PATH(unlink, "unlink", (const char *name_), AT_FDCWD, real(name_))
ON_PATH(unlinkat, "unlink", (int at, const char *name_, int flags), at, real(at, name_, flags))
ON_PATH(rmdir, "rmdir", (const char *name_), AT_FDCWD, real(name_))
ON_PATH(mkdir, "mkdir", (const char *name_, mode_t mode), AT_FDCWD, real(name_, mode))
ON_PATH(mkdirat, "mkdir", (int at, const char *name_, mode_t mode), at, real(at, name_, mode))
ON_PATH(chmod, "chmod", (const char *name_, mode_t mode), AT_FDCWD, real(name_, mode))
ON_PATH(fchmodat, "chmod", (int at, const char *name_, mode_t mode, int flags), at,
        real(at, name_, mode, flags))

int rename(const char *from, const char *to) {
    REAL(rename);
    char path[PATH_MAX];
    if (watched_at(AT_FDCWD, from, path)) CHECK("rename", path, to);
    return real(from, to);
}

int renameat(int at, const char *from, int other, const char *to) {
    REAL(renameat);
    char path[PATH_MAX], target[PATH_MAX];
    if (watched_at(at, from, path)) {
        watched_at(other, to, target);
        CHECK("rename", path, target);
    }
    return real(at, from, other, to);
}

#define OPENS(name, parameters, directory, call) \
    int name parameters { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, int); \
            va_end(rest); \
        } \
        char path[PATH_MAX]; \
        if ((flags & (O_CREAT | O_TRUNC)) && watched_at(directory, file, path)) \
            CHECK("open", path, ""); \
        return call; \
    }

OPENS(open, (const char *file, int flags, ...), AT_FDCWD, real(file, flags, mode))
OPENS(open64, (const char *file, int flags, ...), AT_FDCWD, real(file, flags, mode))
OPENS(openat, (int at, const char *file, int flags, ...), at, real(at, file, flags, mode))
OPENS(openat64, (int at, const char *file, int flags, ...), at, real(at, file, flags, mode))

FILE *fopen(const char *file, const char *mode) {
    REAL(fopen);
    char path[PATH_MAX];
    if (mode[0] != 'r' && watched_at(AT_FDCWD, file, path)) switch (disturbed("open", path, "")) {
        case 1: return NULL;
        case 2: die();
    }
    return real(file, mode);
}

FILE *fopen64(const char *file, const char *mode) { return fopen(file, mode); }
