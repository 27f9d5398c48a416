// SPDX-License-Identifier: Apache-2.0
// What headers of GCC 9 to 12 and of glibc 2.32 expect from newer runtime libraries, defined here under its mangled
// name, so that a library runs on those of GCC 8 and glibc 2.28, as torch does. Included once in each library.
#pragma once

#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && defined(__GLIBC__)
#define SSLKERNELS_INSTEAD_OF(symbol) __asm__(symbol) __attribute__((visibility("hidden")))

extern "C" {

// 0: reference counts are atomic, which is always right.
extern char sslkernels_single_threaded SSLKERNELS_INSTEAD_OF("__libc_single_threaded");
char sslkernels_single_threaded = 0;

[[noreturn]] void sslkernels_throw_length() SSLKERNELS_INSTEAD_OF("_ZSt28__throw_bad_array_new_lengthv");
void sslkernels_throw_length() { throw std::bad_array_new_length(); }

void sslkernels_make_output(std::ostringstream* stream)
    SSLKERNELS_INSTEAD_OF("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void sslkernels_make_output(std::ostringstream* stream) { new (stream) std::ostringstream(std::ios_base::out); }

void sslkernels_make_stream(std::stringstream* stream)
    SSLKERNELS_INSTEAD_OF("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void sslkernels_make_stream(std::stringstream* stream) {
  new (stream) std::stringstream(std::ios_base::in | std::ios_base::out);
}

}  // extern "C"
#endif
