/* Shift the wall clock of a process by the nanoseconds in the file $SOAK_CLOCK, which may change at any time.

   Loaded with LD_PRELOAD. Only CLOCK_REALTIME is shifted, as when NTP steps the clock of a host. Timed waits with an
   absolute wall-clock time are converted back, because the kernel's clock is not shifted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
/* Absolute times before this one (in 2001) are of the monotonic clock, which some condition variables use. */
#define FIRST_WALL_CLOCK_TIME 1000000000LL

static const volatile int64_t *offset;

__attribute__((constructor)) static void map_offset(void) {
  const char *path = getenv("SOAK_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *found = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
  if (found != MAP_FAILED) offset = found;
  close(file);
}

static int64_t shift(void) { return offset ? *offset : 0; }

static void add(struct timespec *t, int64_t nanoseconds) {
  int64_t total = t->tv_sec * SECOND + t->tv_nsec + nanoseconds;
  t->tv_sec = total / SECOND;
  t->tv_nsec = total % SECOND;
}

int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*next)(clockid_t, struct timespec *);
  if (!next) next = dlsym(RTLD_NEXT, "clock_gettime");
  int result = next(id, t);
  if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) add(t, shift());
  return result;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  struct timespec now;
  (void)zone;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *t) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}

static struct timespec of_kernel(const struct timespec *t) {
  struct timespec found = *t;
  if (found.tv_sec >= FIRST_WALL_CLOCK_TIME) add(&found, -shift());
  return found;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict t) {
  static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* older versions differ */
  if (!next) next = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec until = of_kernel(t);
  return next(cond, mutex, &until);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict t) {
  static int (*next)(pthread_mutex_t *, const struct timespec *);
  if (!next) next = dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
  struct timespec until = of_kernel(t);
  return next(mutex, &until);
}

int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict t) {
  static int (*next)(sem_t *, const struct timespec *);
  if (!next) next = dlsym(RTLD_NEXT, "sem_timedwait");
  struct timespec until = of_kernel(t);
  return next(sem, &until);
}
