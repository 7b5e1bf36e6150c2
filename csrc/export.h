// Functions that Python finds by name.
#pragma once

#if defined(_WIN32)
#define COBRA_EXPORT extern "C" __declspec(dllexport)
#else
#define COBRA_EXPORT extern "C" __attribute__((visibility("default")))
#endif
