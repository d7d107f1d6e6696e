# cuDNN with the headers of cudnn-frontend, and NCCL, as targets deltapipe_cudnn and deltapipe_nccl. They are looked for
# beside the CUDA toolkit, in the system's folders and under DELTAPIPE_CUDNN_FRONTEND, CUDNN_ROOT and NCCL_ROOT.
set(DELTAPIPE_CUDNN_FRONTEND "$ENV{DELTAPIPE_CUDNN_FRONTEND}" CACHE PATH
  "Folder with cudnn-frontend's include/cudnn_frontend.h (empty: where tools/bootstrap.sh --cuda puts it)")

# deltapipe_cuda_library(TARGET NAME HEADER h LIBRARY name ROOT dir HINT text): an imported target.
function(deltapipe_cuda_library target)
  cmake_parse_arguments(arg "" "HEADER;LIBRARY;ROOT;HINT" "" ${ARGN})
  find_path(${target}_include ${arg_HEADER} HINTS ${arg_ROOT} ${CUDAToolkit_INCLUDE_DIRS} PATH_SUFFIXES include)
  find_library(${target}_library NAMES ${arg_LIBRARY} HINTS ${arg_ROOT} ${CUDAToolkit_LIBRARY_DIR}
    PATH_SUFFIXES lib lib64 lib/x86_64-linux-gnu)
  if(NOT ${target}_include OR NOT ${target}_library)
    message(FATAL_ERROR "DELTAPIPE_CUDA needs ${arg_HEADER} and lib${arg_LIBRARY}: ${arg_HINT}")
  endif()
  add_library(${target} INTERFACE)
  target_include_directories(${target} SYSTEM INTERFACE ${${target}_include})
  target_link_libraries(${target} INTERFACE ${${target}_library})
endfunction()

deltapipe_cuda_library(deltapipe_cudnn HEADER cudnn.h LIBRARY cudnn ROOT "$ENV{CUDNN_ROOT}"
  HINT "install cuDNN 9 (packages libcudnn9-cuda-13 and libcudnn9-dev-cuda-13) or set CUDNN_ROOT")
deltapipe_cuda_library(deltapipe_nccl HEADER nccl.h LIBRARY nccl ROOT "$ENV{NCCL_ROOT}"
  HINT "install NCCL 2.28 or newer (packages libnccl2 and libnccl-dev) or set NCCL_ROOT")

find_path(deltapipe_cudnn_frontend_include cudnn_frontend.h
  HINTS ${DELTAPIPE_CUDNN_FRONTEND} "$ENV{XDG_CACHE_HOME}/deltapipe/cudnn-frontend"
    "$ENV{HOME}/.cache/deltapipe/cudnn-frontend"
  PATH_SUFFIXES include)
if(NOT deltapipe_cudnn_frontend_include)
  message(FATAL_ERROR "DELTAPIPE_CUDA needs the headers of cudnn-frontend: run tools/bootstrap.sh --cuda, or set "
    "DELTAPIPE_CUDNN_FRONTEND to a folder with include/cudnn_frontend.h")
endif()
target_include_directories(deltapipe_cudnn SYSTEM INTERFACE ${deltapipe_cudnn_frontend_include})
target_compile_definitions(deltapipe_cudnn INTERFACE CUDNN_FRONTEND_SKIP_JSON_LIB)
# The headers compile kernels of their own for some operations, none of ours, and so refer to nvrtc.
target_link_libraries(deltapipe_cudnn INTERFACE CUDA::cudart CUDA::nvrtc ${CMAKE_DL_LIBS})
