// Of a portable program (DELTAPIPE_PORTABLE). With headers of glibc 2.38 and later a call of strtol is one of
// __isoc23_strtol, which takes binary numbers too, and a program that has it from the library does not start with an
// older one. So it is defined here, by the function that every glibc has; for the static C++ library as well.

// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming): the C library's names
extern "C" {

long oldest_strtol(const char*, char**, int) __asm__("strtol");
long long oldest_strtoll(const char*, char**, int) __asm__("strtoll");
unsigned long oldest_strtoul(const char*, char**, int) __asm__("strtoul");
unsigned long long oldest_strtoull(const char*, char**, int) __asm__("strtoull");

long __isoc23_strtol(const char* text, char** end, int base) { return oldest_strtol(text, end, base); }
long long __isoc23_strtoll(const char* text, char** end, int base) { return oldest_strtoll(text, end, base); }
unsigned long __isoc23_strtoul(const char* text, char** end, int base) { return oldest_strtoul(text, end, base); }
unsigned long long __isoc23_strtoull(const char* text, char** end, int base) {
  return oldest_strtoull(text, end, base);
}

}  // extern "C"
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)
