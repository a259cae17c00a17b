# Adds our sources to upstream's targets, without a line in upstream's CMake files. Included after
# add_subdirectory(llama.cpp). Which target a file goes into follows from its folder:
#
#   ggml_ext/{kv,transform,observe,sampler}/*.cpp  llama
#   ggml_ext/*/cpu/*.{c,cpp}  every CPU backend: ggml-cpu, or ggml-cpu-<tag> with GGML_CPU_ALL_VARIANTS
#   ggml_ext/*/*.{c,cpp}      ggml-base
#   cuda/**/*.cu              ggml-cuda, where that is built
#
# Files x86*, avx* in cpu/ and sampler/ are SIMD chosen at run time, see core/x86.h.

get_filename_component(GGML_EXT_ROOT "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

set(GGML_EXT_WARNINGS -Wall -Wextra)
# Upstream's headers, which ours include, have unused parameters and functions.
set(GGML_EXT_CUDA_WARNINGS -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-Wno-unused-function)
if (GGML_EXT_TESTS AND GGML_EXT_WERROR)
    list(APPEND GGML_EXT_WARNINGS -Werror)
    list(APPEND GGML_EXT_CUDA_WARNINGS -Werror=all-warnings -Xcompiler=-Werror)
endif()

# Upstream's patched files include our headers by name; PRIVATE, since no installed header does.
function(ggml_ext_include target)
    target_include_directories(${target} PRIVATE
        "${GGML_EXT_ROOT}/ggml_ext" "${GGML_EXT_ROOT}/ggml_ext/include" "${GGML_EXT_ROOT}/ggml_ext/hooks")
endfunction()

# SIMD chosen at run time has the instructions of its function attributes and no others, whatever processor the rest is
# compiled for. Both options are needed: -march does not take back a single -mavx512f, as upstream's variants have it.
set(GGML_EXT_SIMD_OPTIONS "")
if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8
        AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" AND NOT CMAKE_OSX_ARCHITECTURES)
    set(GGML_EXT_SIMD_OPTIONS -march=x86-64 -mno-sse3 -mno-bmi2)
endif()

function(ggml_ext_inject target)
    ggml_ext_include(${target})
    target_sources(${target} PRIVATE ${ARGN})
    # Source properties are seen by the directory that compiles the file, which is upstream's.
    foreach(source IN ITEMS ${ARGN})
        set(warnings ${GGML_EXT_WARNINGS})
        if (source MATCHES "\\.cu$")
            set(warnings ${GGML_EXT_CUDA_WARNINGS})
        endif()
        set(simd "")
        if (source MATCHES "/(cpu|sampler)/(x86|avx)[^/]*$")
            set(simd ${GGML_EXT_SIMD_OPTIONS})
        endif()
        set_property(SOURCE "${source}" TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS ${warnings} ${simd})
    endforeach()
    set_property(SOURCE ${ARGN} TARGET_DIRECTORY ${target} PROPERTY SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()

file(GLOB_RECURSE GGML_EXT_BASE_SOURCES CONFIGURE_DEPENDS
    "${GGML_EXT_ROOT}/ggml_ext/*.c" "${GGML_EXT_ROOT}/ggml_ext/*.cpp")
set(GGML_EXT_CPU_SOURCES ${GGML_EXT_BASE_SOURCES})
set(GGML_EXT_LLAMA_SOURCES ${GGML_EXT_BASE_SOURCES})
list(FILTER GGML_EXT_LLAMA_SOURCES INCLUDE REGEX "/ggml_ext/(kv|transform|observe|sampler)/[^/]+\\.cpp$")
list(FILTER GGML_EXT_CPU_SOURCES INCLUDE REGEX "/cpu/[^/]+\\.(c|cpp)$")
list(REMOVE_ITEM GGML_EXT_BASE_SOURCES ${GGML_EXT_CPU_SOURCES} ${GGML_EXT_LLAMA_SOURCES})
file(GLOB_RECURSE GGML_EXT_CUDA_SOURCES CONFIGURE_DEPENDS "${GGML_EXT_ROOT}/cuda/*.cu")

ggml_ext_inject(ggml-base ${GGML_EXT_BASE_SOURCES})
if (TARGET llama)
    ggml_ext_inject(llama ${GGML_EXT_LLAMA_SOURCES})
endif()
foreach(target llama-common server-context)  # with hooks, and none of our sources
    if (TARGET ${target})
        ggml_ext_include(${target})
    endif()
endforeach()

get_property(GGML_EXT_GGML_TARGETS DIRECTORY "${GGML_EXT_LLAMA_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
foreach(target IN LISTS GGML_EXT_GGML_TARGETS)
    if (target MATCHES "^ggml-cpu(-.+)?$" AND NOT target MATCHES "-feats$")
        ggml_ext_inject(${target} ${GGML_EXT_CPU_SOURCES})
        # The reference of the dot products, which numpy repeats bit for bit.
        file(GLOB GGML_EXT_GENERIC_SOURCES "${GGML_EXT_ROOT}/ggml_ext/fq*/cpu/generic.c")
        set_property(SOURCE ${GGML_EXT_GENERIC_SOURCES} TARGET_DIRECTORY ${target}
            APPEND PROPERTY COMPILE_OPTIONS -ffp-contract=off)
        set(GGML_EXT_HAS_CPU TRUE)
    endif()
endforeach()
if (NOT GGML_EXT_HAS_CPU)
    message(FATAL_ERROR "this llama.cpp has no ggml-cpu target in ${GGML_EXT_LLAMA_DIR}/ggml/src; see docs/upstream.md")
endif()

if (TARGET ggml-cuda AND GGML_EXT_CUDA_SOURCES)
    ggml_ext_inject(ggml-cuda ${GGML_EXT_CUDA_SOURCES})
    target_include_directories(ggml-cuda PRIVATE "${GGML_EXT_ROOT}/cuda" "${GGML_EXT_LLAMA_DIR}/ggml/src/ggml-cuda")
endif()

# Both compile upstream's ggml-cuda.cu, whose patched lines ask for ext-cuda.h.
foreach(target ggml-hip ggml-musa)
    if (TARGET ${target})
        target_include_directories(${target} PRIVATE "${GGML_EXT_ROOT}/cuda/stub")
    endif()
endforeach()

# The same token for the same seed, whatever the processor: the paths of the sampler give the same bits.
if (TARGET llama)
    set(GGML_EXT_SAMPLER_SOURCES ${GGML_EXT_LLAMA_SOURCES})
    list(FILTER GGML_EXT_SAMPLER_SOURCES INCLUDE REGEX "/sampler/[^/]+\\.cpp$")
    set_property(SOURCE ${GGML_EXT_SAMPLER_SOURCES} TARGET_DIRECTORY llama
        APPEND PROPERTY COMPILE_OPTIONS -ffp-contract=off)
endif()

# The encoder's results are part of the format's definition: the same bits from every compiler.
file(GLOB GGML_EXT_TYPE_SOURCES "${GGML_EXT_ROOT}/ggml_ext/fq*/fq*.c")
set_property(SOURCE ${GGML_EXT_TYPE_SOURCES} TARGET_DIRECTORY ggml-base
    APPEND PROPERTY COMPILE_OPTIONS -ffp-contract=off)

if (TARGET test-backend-ops)
    ggml_ext_include(test-backend-ops)
    target_include_directories(test-backend-ops PRIVATE "${GGML_EXT_ROOT}/tests/native")
endif()
