# COMMRT_CUDA=AUTO   the CUDA kernels, where there is a compiler for them
#             ON     or an error
#             OFF    none
#             SHIM   the same kernels by the host's compiler, taking addresses of the CPU: for tests

set(COMMRT_CUDA_SOURCES
  cuda/block_encode.cu cuda/coset.cu cuda/decode.cu cuda/decode_average_encode.cu cuda/device.cu
  cuda/dither.cu cuda/lmmse_combine.cu cuda/loco_encode.cu cuda/patch_apply.cu
  cuda/polar_decode.cu cuda/polar_transform.cu cuda/rans.cu cuda/rescale.cu cuda/step.cu)
set(COMMRT_CUDA_NAME none)

if(COMMRT_CUDA STREQUAL "SHIM")
  set(COMMRT_CUDA_NAME shim)
elseif(COMMRT_CUDA STREQUAL "AUTO" OR COMMRT_CUDA STREQUAL "ON")
  # Machine code for Ampere and Hopper, and PTX, which the driver compiles for what comes after.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90")
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # so that the module loads where there is no driver
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(COMMRT_NVCC nvcc HINTS /usr/local/cuda/bin)
    if(COMMRT_NVCC)
      set(ENV{CUDACXX} ${COMMRT_NVCC})
    endif()
  endif()
  if(COMMRT_CUDA STREQUAL "AUTO")
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(COMMRT_CUDA STREQUAL "ON" OR CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12)  # which has C++20
    set(CMAKE_CUDA_EXTENSIONS ON)  # else CMake adds the compiler's default -std behind ours
    set(COMMRT_CUDA_NAME nvcc)
  elseif(COMMRT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "nvcc ${CMAKE_CUDA_COMPILER_VERSION}: must be 12 or later")
  endif()
elseif(NOT COMMRT_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "COMMRT_CUDA=${COMMRT_CUDA}: must be AUTO, ON, OFF or SHIM")
endif()
message(STATUS "CUDA kernels: ${COMMRT_CUDA_NAME}")

# Adds the kernels to a target. No flag may change a value: no contraction, no fast math.
function(commrt_add_cuda target)
  target_compile_definitions(${target} PRIVATE "COMMRT_CUDA_NAME=\"${COMMRT_CUDA_NAME}\"")
  if(COMMRT_CUDA_NAME STREQUAL "none")
    return()
  endif()
  target_compile_definitions(${target} PRIVATE COMMRT_CUDA)
  add_library(cuda_kernels OBJECT ${COMMRT_CUDA_SOURCES})
  if(COMMRT_CUDA_NAME STREQUAL "nvcc")
    target_compile_options(cuda_kernels PRIVATE
      -std=c++20  # from nvcc 12 on; as a flag, since CMake 3.25 does not know that of nvcc 13
      -fmad=false -Xcompiler=-Wall,-Wextra)
  else()
    set_source_files_properties(${COMMRT_CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
    target_compile_features(cuda_kernels PRIVATE cxx_std_20)
    target_sources(cuda_kernels PRIVATE shim/fiber.cpp shim/thread_block.cpp)
    target_compile_options(cuda_kernels PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:-O2;-Wall;-Wextra;-Wno-unknown-pragmas;-ffp-contract=off>")
    set_source_files_properties(${COMMRT_CUDA_SOURCES} PROPERTIES COMPILE_OPTIONS "-xc++")
  endif()
  target_link_libraries(${target} PRIVATE cuda_kernels)
endfunction()
