/* What the MPI programs share: the clock, the order of times, and which MPI this is. */
#ifndef MPI_PEER_H
#define MPI_PEER_H

#include <mpi.h>
#include <stdio.h>
#include <time.h>

static double now_us(void) {
  struct timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * 1e6 + ts.tv_nsec * 1e-3;
}

/* For qsort. */
static int cmp_d(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

/* The name of the MPI; writes its version. */
static const char *mpi_peer(char version[64]) {
  snprintf(version, 64, "unknown");
#if defined(OMPI_MAJOR_VERSION)
  char lib[MPI_MAX_LIBRARY_VERSION_STRING];
  int len;
  MPI_Get_library_version(lib, &len);
  sscanf(lib, "Open MPI v%63[0-9.a-z]", version);
  return "openmpi";
#elif defined(MPICH_VERSION)
  snprintf(version, 64, "%s", MPICH_VERSION);
  return "mpich";
#else
  return "mpi";
#endif
}

#endif
