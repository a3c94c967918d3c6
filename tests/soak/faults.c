/* Faults at the N-th file operation below a folder, for tests/soak/chaos.py.

   cc -shared -fPIC -o faults.so faults.c -ldl; LD_PRELOAD=faults.so COMMAND

   FAULT_ROOT     the folder; operations on other files do not count
   FAULT_AT       number of the operation to fail, from 1; 0: none
   FAULT_ACTION   eio: it fails once; enospc: from it on, all that need space
                  fail; kill, term, stop: it sends the process that signal
   FAULT_REPORT   file that receives the operation that failed, and at the
                  normal end of the process the number of operations
*/

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FILES = 65536 };
static const char *root, *report, *action;
static size_t root_length;
static long fault_at;
static atomic_long operations;
static atomic_bool full;
static atomic_bool tracked[FILES]; /* Open files below the root. */

static void tell(const char *format, const char *name, long number) {
  if (!report) return;
  char line[512];
  int length = snprintf(line, sizeof line, format, name, number);
  int file = syscall(SYS_openat, AT_FDCWD, report,
                     O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  syscall(SYS_write, file, line, length);
  syscall(SYS_close, file);
}

/* A process that was forked reads its own environment by this. */
__attribute__((constructor)) void faults_start(void) {
  operations = 0;
  root = getenv("FAULT_ROOT");
  root_length = root ? strlen(root) : 0;
  report = getenv("FAULT_REPORT");
  action = getenv("FAULT_ACTION");
  const char *at = getenv("FAULT_AT");
  fault_at = at ? atol(at) : 0;
}

__attribute__((destructor)) static void finish(void) {
  if (operations) tell("%s: %ld\n", "operations", operations);
}

static int is_below(int folder, const char *path) {
  if (!root || !path) return 0;
  if (path[0] == '/') return strncmp(path, root, root_length) == 0;
  return folder >= 0 && folder < FILES && tracked[folder];
}

static int is_tracked(int file) {
  return root && file >= 0 && file < FILES && tracked[file];
}

/* Counts an operation; returns the error with which it fails, or 0. */
static int count(const char *name, int needs_space) {
  long number = ++operations;
  if (full && needs_space) return ENOSPC;
  if (number != fault_at || !action) return 0;
  tell("fault at %s, operation %ld\n", name, number);
  if (!strcmp(action, "eio")) return EIO;
  if (!strcmp(action, "enospc")) {
    full = 1;
    return needs_space ? ENOSPC : 0;
  }
  if (!strcmp(action, "kill")) kill(getpid(), SIGKILL);
  if (!strcmp(action, "term")) kill(getpid(), SIGTERM);
  if (!strcmp(action, "stop")) kill(getpid(), SIGSTOP);
  return 0;
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = dlsym(RTLD_NEXT, #name)

#define FAIL(condition, name, needs_space, result) \
  if (condition) { \
    int error = count(name, needs_space); \
    if (error) { \
      errno = error; \
      return result; \
    } \
  }

static int opened(int file, int below) {
  if (file >= 0 && file < FILES) tracked[file] = below;
  return file;
}

#define MODE(flags, mode) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list arguments; \
    va_start(arguments, flags); \
    mode = va_arg(arguments, mode_t); \
    va_end(arguments); \
  }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    MODE(flags, mode) \
    int below = is_below(-1, path); \
    FAIL(below, #name, (flags & O_CREAT) != 0, -1) \
    return opened(real(path, flags, mode), below); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    REAL(name); \
    MODE(flags, mode) \
    int below = is_below(folder, path); \
    FAIL(below, #name, (flags & O_CREAT) != 0, -1) \
    return opened(real(folder, path, flags, mode), below); \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
  FILE *name(const char *path, const char *mode) { \
    REAL(name); \
    int below = is_below(-1, path); \
    FAIL(below, #name, mode[0] != 'r', NULL) \
    FILE *file = real(path, mode); \
    if (file) opened(fileno(file), below); \
    return file; \
  }
FOPEN(fopen)
FOPEN(fopen64)

int close(int file) {
  REAL(close);
  if (file >= 0 && file < FILES) tracked[file] = 0;
  return real(file);
}

#define ON_FILE(type, name, needs_space, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    FAIL(is_tracked(file), #name, needs_space, -1) \
    return real arguments; \
  }
ON_FILE(ssize_t, read, 0, (int file, void *to, size_t n), (file, to, n))
ON_FILE(ssize_t, pread, 0, (int file, void *to, size_t n, off_t at),
        (file, to, n, at))
ON_FILE(ssize_t, pread64, 0, (int file, void *to, size_t n, off64_t at),
        (file, to, n, at))
ON_FILE(ssize_t, readv, 0, (int file, const struct iovec *to, int n),
        (file, to, n))
ON_FILE(ssize_t, write, 1, (int file, const void *from, size_t n),
        (file, from, n))
ON_FILE(ssize_t, pwrite, 1, (int file, const void *from, size_t n, off_t at),
        (file, from, n, at))
ON_FILE(ssize_t, pwrite64, 1,
        (int file, const void *from, size_t n, off64_t at),
        (file, from, n, at))
ON_FILE(ssize_t, writev, 1, (int file, const struct iovec *from, int n),
        (file, from, n))
ON_FILE(int, fsync, 1, (int file), (file))
ON_FILE(int, fdatasync, 1, (int file), (file))
ON_FILE(int, ftruncate, 1, (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, 1, (int file, off64_t size), (file, size))

size_t fwrite(const void *from, size_t size, size_t n, FILE *stream) {
  REAL(fwrite);
  FAIL(is_tracked(fileno(stream)), "fwrite", 1, 0)
  return real(from, size, n, stream);
}

int fflush(FILE *stream) {
  REAL(fflush);
  FAIL(stream && is_tracked(fileno(stream)), "fflush", 1, EOF)
  return real(stream);
}

#define ON_PATH(type, failed, name, needs_space, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    FAIL(is_below(folder, path), #name, needs_space, failed) \
    return real arguments; \
  }
#define PATH(name, needs_space, parameters, arguments) \
  int name parameters { \
    REAL(name); \
    FAIL(is_below(-1, path), #name, needs_space, -1) \
    return real arguments; \
  }
PATH(rename, 0, (const char *path, const char *to), (path, to))
PATH(unlink, 0, (const char *path), (path))
PATH(remove, 0, (const char *path), (path))
PATH(rmdir, 0, (const char *path), (path))
PATH(mkdir, 1, (const char *path, mode_t mode), (path, mode))
PATH(access, 0, (const char *path, int mode), (path, mode))
PATH(stat, 0, (const char *path, struct stat *to), (path, to))
PATH(stat64, 0, (const char *path, struct stat64 *to), (path, to))
PATH(lstat, 0, (const char *path, struct stat *to), (path, to))
PATH(lstat64, 0, (const char *path, struct stat64 *to), (path, to))
ON_PATH(int, -1, renameat, 0,
        (int folder, const char *path, int other, const char *to),
        (folder, path, other, to))
ON_PATH(int, -1, unlinkat, 0, (int folder, const char *path, int flags),
        (folder, path, flags))
ON_PATH(int, -1, mkdirat, 1, (int folder, const char *path, mode_t mode),
        (folder, path, mode))
ON_PATH(int, -1, fstatat, 0,
        (int folder, const char *path, struct stat *to, int flags),
        (folder, path, to, flags))
ON_PATH(int, -1, fstatat64, 0,
        (int folder, const char *path, struct stat64 *to, int flags),
        (folder, path, to, flags))

DIR *opendir(const char *path) {
  REAL(opendir);
  FAIL(is_below(-1, path), "opendir", 0, NULL)
  DIR *folder = real(path);
  if (folder) opened(dirfd(folder), is_below(-1, path));
  return folder;
}
