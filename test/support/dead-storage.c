// Storage that stops answering, as a library that is loaded before libc (LD_PRELOAD): each call to libc that touches
// a file under one of the given folders is noted, and from one of them on they hang until the test lets them go.
//
//   DEAD_UNDER    folders, separated by colons
//   DEAD_LOG      file to which a line is appended for each such call: "main|other NAME PATH", and "dead NAME PATH" when
//                 the storage dies
//   DEAD_CALL     the name of the call with which it dies; unset: it lives
//   DEAD_NTH      of that name's calls, counted from 0
//   DEAD_RELEASE  it answers again when this file is there
//
// Node and libuv call libc through the dynamic linker, so their calls come here. koffi asks dlsym for libc's functions,
// so dlsym comes here, too, and answers with the functions below.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stddef.h>

typedef long (*call_t)(long, long, long, long, long, long, long);
extern char *getenv(const char *);
extern int *__errno_location(void);

#if defined(__x86_64__)
#define NR_read 0
#define NR_write 1
#define NR_close 3
#define NR_getpid 39
#define NR_gettid 186
#define NR_nanosleep 35
#define NR_openat 257
#define NR_readlinkat 267
#define NR_faccessat 269
#define NR_statx 332
#elif defined(__aarch64__)
#define NR_read 63
#define NR_write 64
#define NR_close 57
#define NR_getpid 172
#define NR_gettid 178
#define NR_nanosleep 101
#define NR_openat 56
#define NR_readlinkat 78
#define NR_faccessat 48
#define NR_statx 291
#endif
#define AT_FDCWD -100
#define LOG_FLAGS 02001 /* O_WRONLY | O_APPEND */

static void *(*real_dlsym)(void *, const char *);
static long (*real_syscall)(long, ...);
static const char *folders, *log_path, *dying_call, *release_path;
static int nth;
static int counted;
static int dead;

static int length(const char *text) {
  int n = 0;
  while (text[n]) n++;
  return n;
}

static int same(const char *a, const char *b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

static int number(const char *text) {
  int n = 0;
  while (text && *text >= '0' && *text <= '9') n = n * 10 + (*text++ - '0');
  return n;
}

__attribute__((constructor)) static void load(void) {
  if (real_dlsym) return;
  real_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
  if (!real_dlsym) real_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.17");
  if (!real_dlsym) real_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
  real_syscall = (long (*)(long, ...))real_dlsym(RTLD_NEXT, "syscall");
  folders = getenv("DEAD_UNDER");
  log_path = getenv("DEAD_LOG");
  dying_call = getenv("DEAD_CALL");
  release_path = getenv("DEAD_RELEASE");
  nth = number(getenv("DEAD_NTH"));
}

static int is_under(const char *path) {
  const char *folder = folders;
  while (folder && *folder) {
    int i = 0;
    while (folder[i] && folder[i] != ':' && folder[i] == path[i]) i++;
    if ((!folder[i] || folder[i] == ':') && (path[i] == '/' || !path[i])) return 1;
    while (*folder && *folder != ':') folder++;
    if (*folder == ':') folder++;
  }
  return 0;
}

static int path_of_fd(long fd, char *path, int bytes) {
  char link[32] = "/proc/self/fd/";
  char digits[12];
  int count = 0, at = 14;
  if (fd < 0) return 0;
  do digits[count++] = '0' + fd % 10;
  while ((fd /= 10) > 0);
  while (count > 0) link[at++] = digits[--count];
  link[at] = 0;
  long n = real_syscall(NR_readlinkat, AT_FDCWD, link, path, bytes - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return 1;
}

static void note(const char *kind, const char *name, const char *path) {
  char line[700];
  int at = 0;
  const char *parts[] = {kind, " ", name, " ", path, "\n"};
  for (int i = 0; i < 6; i++)
    for (const char *c = parts[i]; *c && at < 698; c++) line[at++] = *c;
  if (!log_path) return;
  long fd = real_syscall(NR_openat, AT_FDCWD, log_path, LOG_FLAGS, 0);
  if (fd < 0) return;
  real_syscall(NR_write, fd, line, at);
  real_syscall(NR_close, fd);
}

static void touch(const char *name, const char *path) {
  int kept = *__errno_location();
  int is_main = real_syscall(NR_getpid) == real_syscall(NR_gettid);
  note(is_main ? "main" : "other", name, path);
  if (dying_call && same(name, dying_call) && __atomic_fetch_add(&counted, 1, __ATOMIC_SEQ_CST) == nth) {
    __atomic_store_n(&dead, 1, __ATOMIC_SEQ_CST);
    note("dead", name, path);
  }
  while (__atomic_load_n(&dead, __ATOMIC_SEQ_CST)) {
    if (real_syscall(NR_faccessat, AT_FDCWD, release_path, 0, 0) == 0) break;
    long time[2] = {0, 2000000};
    real_syscall(NR_nanosleep, time, NULL);
  }
  *__errno_location() = kept;
}

static void touch_path(const char *name, const char *path) {
  char target[600];
  load();
  if (!path || !folders) return;
  if (is_under(path)) {
    touch(name, path);
    return;
  }
  const char *prefix = "/proc/self/fd/";
  for (int i = 0; prefix[i]; i++)
    if (path[i] != prefix[i]) return;
  if (path_of_fd(number(path + length(prefix)), target, sizeof target) && is_under(target)) touch(name, target);
}

static void touch_fd(const char *name, long fd) {
  char target[600];
  load();
  if (folders && path_of_fd(fd, target, sizeof target) && is_under(target)) touch(name, target);
}

static call_t real(const char *name) {
  load();
  return (call_t)real_dlsym(RTLD_NEXT, name);
}

#define REAL(name) \
  static call_t next; \
  if (!next) next = real(name)

#define BY_FD(symbol, name) \
  long symbol(long a, long b, long c, long d, long e, long f, long g) { \
    REAL(#symbol); \
    touch_fd(name, (int)a); \
    return next(a, b, c, d, e, f, g); \
  }

#define BY_PATH(symbol, name, path) \
  long symbol(long a, long b, long c, long d, long e, long f, long g) { \
    REAL(#symbol); \
    touch_path(name, (const char *)path); \
    return next(a, b, c, d, e, f, g); \
  }

BY_PATH(open, "open", a)
BY_PATH(open64, "open", a)
BY_PATH(openat, "open", b)
BY_PATH(openat64, "open", b)
BY_PATH(stat, "stat", a)
BY_PATH(stat64, "stat", a)
BY_PATH(lstat, "stat", a)
BY_PATH(lstat64, "stat", a)
BY_PATH(realpath, "realpath", a)
BY_PATH(readlink, "readlink", a)
BY_PATH(scandir, "scandir", a)
BY_PATH(scandir64, "scandir", a)
BY_PATH(opendir, "scandir", a)
BY_PATH(access, "access", a)
BY_PATH(unlink, "unlink", a)
BY_PATH(rename, "rename", b)
BY_PATH(link, "link", b)
BY_PATH(linkat, "linkat", d)
BY_PATH(mkdir, "mkdir", a)
BY_PATH(chmod, "chmod", a)
BY_PATH(statfs, "statfs", a)
BY_PATH(statfs64, "statfs", a)
BY_FD(close, "close")
BY_FD(fstat, "fstat")
BY_FD(fstat64, "fstat")
BY_FD(fstatfs, "fstatfs")
BY_FD(fstatfs64, "fstatfs")
BY_FD(fchmod, "fchmod")
BY_FD(fchown, "fchown")
BY_FD(fsync, "fsync")
BY_FD(fdatasync, "fdatasync")
BY_FD(ftruncate, "ftruncate")
BY_FD(ftruncate64, "ftruncate")
BY_FD(read, "read")
BY_FD(write, "write")
BY_FD(pread, "pread")
BY_FD(pread64, "pread")
BY_FD(pwrite, "pwrite")
BY_FD(pwrite64, "pwrite")
BY_FD(preadv, "pread")
BY_FD(preadv64, "pread")
BY_FD(pwritev, "pwrite")
BY_FD(pwritev64, "pwrite")
BY_FD(preadv64v2, "preadv2")
BY_FD(lseek, "lseek")
BY_FD(lseek64, "lseek")
BY_FD(fallocate, "fallocate")
BY_FD(fallocate64, "fallocate")
BY_FD(posix_fadvise64, "fadvise")
BY_FD(fcntl, "fcntl")
BY_FD(fcntl64, "fcntl")
BY_FD(flistxattr, "flistxattr")
BY_FD(fgetxattr, "fgetxattr")
BY_FD(fsetxattr, "fsetxattr")

static void touch_statx(long folder_fd, const char *path) {
  if (path && *path) touch_path("stat", path);
  else touch_fd("fstat", (int)folder_fd);
}

long statx(long a, long b, long c, long d, long e) {
  REAL("statx");
  touch_statx(a, (const char *)b);
  return next(a, b, c, d, e, 0, 0);
}

long syscall(long call, long a, long b, long c, long d, long e, long f) {
  load();
  if (call == NR_statx) touch_statx(a, (const char *)b);
  if (call == NR_close) touch_fd("close", (int)a);
  return real_syscall(call, a, b, c, d, e, f);
}

static const struct {
  const char *name;
  void *function;
} ours[] = {
    {"lseek64", lseek64},       {"pread64", pread64},         {"pwrite64", pwrite64},   {"preadv64v2", preadv64v2},
    {"fallocate64", fallocate64}, {"posix_fadvise64", posix_fadvise64}, {"fcntl64", fcntl64}, {"linkat", linkat},
    {"flistxattr", flistxattr}, {"fgetxattr", fgetxattr},     {"fsetxattr", fsetxattr},
};

void *dlsym(void *handle, const char *name) {
  load();
  for (unsigned i = 0; i < sizeof ours / sizeof *ours; i++)
    if (handle != RTLD_NEXT && same(ours[i].name, name)) return ours[i].function;
  return real_dlsym(handle, name);
}
