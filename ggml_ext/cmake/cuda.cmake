# What upstream's CUDA backend needs and a machine may lack: a choice of architectures, cuBLAS, and the driver's
# library to link with. Included before add_subdirectory(llama.cpp), where GGML_CUDA is on; see docs/cuda.md.

set(GGML_EXT_CUBLAS "" CACHE PATH
    "folder with cuBLAS's include/ and lib/, as the wheel nvidia-cublas has it, for a CUDA toolkit without cuBLAS")

find_package(CUDAToolkit)
if (NOT CUDAToolkit_FOUND)
    message(FATAL_ERROR "GGML_CUDA: no CUDA toolkit found; install it, or set CUDAToolkit_ROOT to its folder")
endif()

# --- architectures: those of the machine's devices; without a device, all that are tested to compile ---

# 9.0 -> 90a-real. From 9.0 on, "a" gives the instructions of that one architecture; code for it runs nowhere else.
function(ggml_ext_cuda_devices result)
    find_program(NVIDIA_SMI nvidia-smi)
    set(found "")
    if (NVIDIA_SMI)
        execute_process(COMMAND "${NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
            OUTPUT_VARIABLE listed ERROR_QUIET)
        string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${listed}")
        foreach(capability IN LISTS capabilities)
            string(REPLACE "." "" number "${capability}")
            if (number GREATER_EQUAL 90)
                string(APPEND number "a")
            endif()
            list(APPEND found "${number}-real")
        endforeach()
        list(REMOVE_DUPLICATES found)
    endif()
    set(${result} "${found}" PARENT_SCOPE)
endfunction()

if (NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    ggml_ext_cuda_devices(CMAKE_CUDA_ARCHITECTURES)
    if (NOT CMAKE_CUDA_ARCHITECTURES)
        # 90-virtual: what newer devices compile for themselves when they first load it.
        set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90a-real 90-virtual)
    endif()
endif()

# --- cuBLAS: the toolkit's, GGML_EXT_CUBLAS, or a wheel's in the Python environment ---

# Folder of an installed wheel: nvidia/cu13 since CUDA 13, nvidia/cublas before.
function(ggml_ext_cublas_wheel result)
    set(search [=[
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("nvidia")
for folder in spec.submodule_search_locations if spec else []:
    for name in (f"cu{sys.argv[1]}", *(["cublas"] if int(sys.argv[1]) < 13 else [])):
        if (pathlib.Path(folder) / name / "include" / "cublas_v2.h").is_file():
            sys.exit(print(pathlib.Path(folder) / name))
]=])
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${search}" "${CUDAToolkit_VERSION_MAJOR}"
        OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    set(${result} "${folder}" PARENT_SCOPE)
endfunction()

function(ggml_ext_cublas_use folder)
    foreach(name cublas cublasLt)
        set(library "${folder}/lib/lib${name}.so.${CUDAToolkit_VERSION_MAJOR}")
        if (NOT EXISTS "${library}")
            message(FATAL_ERROR "GGML_CUDA: no ${library}; "
                "set GGML_EXT_CUBLAS to a folder with cuBLAS ${CUDAToolkit_VERSION_MAJOR}")
        endif()
        # Where upstream's find_package(CUDAToolkit) looks for it.
        set(CUDA_${name}_LIBRARY "${library}" CACHE FILEPATH "set by ggml-ext" FORCE)
    endforeach()
    # A path inside the build folder, so that ccache finds the same one in every clone.
    file(CREATE_LINK "${folder}/include" "${CMAKE_BINARY_DIR}/cublas-include" SYMBOLIC)
endfunction()

find_file(GGML_EXT_TOOLKIT_CUBLAS cublas_v2.h PATHS ${CUDAToolkit_INCLUDE_DIRS} NO_DEFAULT_PATH NO_CACHE)
set(GGML_EXT_CUBLAS_DIR "")
if (GGML_EXT_CUBLAS)
    set(GGML_EXT_CUBLAS_DIR "${GGML_EXT_CUBLAS}")
elseif (NOT GGML_EXT_TOOLKIT_CUBLAS OR NOT CUDA_cublas_LIBRARY)
    ggml_ext_cublas_wheel(GGML_EXT_CUBLAS_DIR)
    if (NOT GGML_EXT_CUBLAS_DIR)
        message(FATAL_ERROR "GGML_CUDA: the CUDA toolkit in ${CUDAToolkit_BIN_DIR} has no cuBLAS; "
            "install it, or pip install nvidia-cublas, or set GGML_EXT_CUBLAS")
    endif()
endif()
if (GGML_EXT_CUBLAS_DIR)
    ggml_ext_cublas_use("${GGML_EXT_CUBLAS_DIR}")
endif()

# --- the driver's library: only its virtual memory functions are linked ---

if (NOT TARGET CUDA::cuda_driver)
    message(STATUS "no libcuda to link with: ggml-cuda without virtual memory pools (GGML_CUDA_NO_VMM)")
    set(GGML_CUDA_NO_VMM ON)
endif()

message(STATUS "CUDA ${CUDAToolkit_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}, "
    "cuBLAS ${CUDA_cublas_LIBRARY}")

# After add_subdirectory: where the backend finds cuBLAS and the run-time library, also in an installed package, whose
# neighbour in site-packages the wheel is.
function(ggml_ext_cuda_paths)
    set(rpath "$ORIGIN" "${CUDAToolkit_LIBRARY_DIR}")
    if (GGML_EXT_CUBLAS_DIR)
        target_include_directories(ggml-cuda PRIVATE "${CMAKE_BINARY_DIR}/cublas-include")
        list(APPEND rpath "${GGML_EXT_CUBLAS_DIR}/lib"
            "$ORIGIN/../../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib" "$ORIGIN/../../nvidia/cublas/lib")
    endif()
    set_property(TARGET ggml-cuda PROPERTY INSTALL_RPATH "${rpath}")
endfunction()
