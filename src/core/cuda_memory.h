// The CUDA half of core/device_memory.h, in builds with DELTAPIPE_CUDA. Only device_memory.cpp includes this.
#pragma once

#include <cstddef>
#include <string>

namespace deltapipe::cuda_memory {

int device_count();
std::string describe_device(int index);
void set_device(int index);
void* allocate(int index, std::size_t bytes, const std::string& purpose);
void release(int index, void* memory) noexcept;
std::size_t memory_in_use(int index);
std::size_t memory_size(int index);
void page_lock(void* memory, std::size_t bytes, const std::string& purpose);
void page_unlock(void* memory) noexcept;
void copy(void* stream, std::size_t bytes, const void* from, void* to);
void copy_rows(void* stream, std::size_t rows, std::size_t width, const void* from, std::size_t from_pitch, void* to,
               std::size_t to_pitch);
void synchronize(void* stream);

void* create_stream(int index, bool urgent);
void destroy_stream(void* stream) noexcept;
void* create_event(int index, bool times);
void destroy_event(void* event) noexcept;
void record(void* event, void* stream);
void make_wait(void* stream, void* event);
bool reached(void* event);
void synchronize_event(void* event);
float elapsed_ms(void* begin, void* end);

}  // namespace deltapipe::cuda_memory
