//! `include/xccl_device.h`: its structs are the library's, it compiles everywhere, and kernels on threads can use it.

use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use xccl_c::{xcclDeviceBatch_t, xcclMoeRow_t};
use xccl_tests::{C99, compile, plays_well, succeeds};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_structs_that_kernels_walk_are_the_librarys() {
    let mut source = String::from("#include <stdio.h>\n#include \"xccl_device.h\"\nint main(void) {\n");
    let mut expected = vec![];
    macro_rules! check {
        ($type:ident, $($field:ident),*) => {
            source += &format!("printf(\"%zu\\n\", sizeof({}));\n", stringify!($type));
            expected.push(size_of::<$type>());
            $(
                source += &format!("printf(\"%zu\\n\", offsetof({}, {}));\n", stringify!($type), stringify!($field));
                expected.push(offset_of!($type, $field));
            )*
        };
    }
    check!(xcclMoeRow_t, token_data, scales, output, expert, source, token, weight);
    check!(xcclDeviceBatch_t, size, rows, offsets, rows_done, num_rows, local_experts, hidden, row_bytes, dtype, wire);
    source += "return 0; }\n";
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (file, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&file, source).expect("a source file");
    succeeds(Command::new("cc").arg("-I").arg(root().join("include")).arg(&file).arg("-o").arg(&program));
    let found: Vec<usize> =
        succeeds(&mut Command::new(program)).lines().map(|line| line.parse().expect("a number")).collect();
    assert_eq!(found, expected);
}

#[test]
fn kernels_in_every_standard_compile_without_a_warning() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let program = "#include \"xccl_device.h\"\nint main(void);\nint main(void) { return 0; }\n";
    for (file, standards) in [("kernel.c", ["-std=c99", "-std=c11"]), ("kernel.cc", ["-std=c++11", "-std=c++20"])] {
        let source = dir.path().join(file);
        std::fs::write(&source, program).expect("a source file");
        for (standard, compiler) in standards.iter().flat_map(|s| ["gcc", "clang"].map(|c| (s, c))) {
            succeeds(
                Command::new(compiler)
                    .args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
                    .arg(root().join("include"))
                    .arg(&source),
            );
        }
    }
}

/// The compiler's own CUDA mode needs no toolkit as long as the program says what the toolkit's headers would.
#[test]
fn the_device_side_compiles_as_cuda() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = dir.path().join("kernel.cu");
    let program = r#"
#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __inline__ inline
__device__ void __threadfence_system();
__device__ unsigned long long atomicAdd_system(unsigned long long *, unsigned long long);
#include "xccl_device.h"
__global__ void twice(xcclDeviceBatch_t batch) {
  for (uint64_t i = 0; i < batch.num_rows; i++) {
    const float *token = (const float *)xcclDeviceToken(&batch, i);
    for (uint64_t c = 0; c < batch.hidden; c++) ((float *)xcclDeviceOutput(&batch, i))[c] = 2 * token[c];
  }
  if (!xcclDeviceIsDone(&batch)) xcclDevicePublish(&batch, batch.num_rows);
}
"#;
    std::fs::write(&source, program).expect("a source file");
    succeeds(
        Command::new("clang")
            .args(["-x", "cuda", "-nocudainc", "-nocudalib", "--cuda-device-only", "--cuda-gpu-arch=sm_70"])
            .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-cuda-version", "-fsyntax-only", "-I"])
            .arg(root().join("include"))
            .arg(&source),
    );
}

#[test]
fn kernels_on_threads_compute_rows_in_place() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/device.c");
    let program = compile("cc", &C99, &source, &dir.path().join("device"));
    [1, 2, 3].into_iter().for_each(|n| plays_well(&program, n, "", &[]));
}

/// Reads every outbox on a GPU. Needs the CUDA toolkit and a device.
#[test]
fn a_gpu_reads_rows_from_registered_outboxes() {
    let has = |program: &str, argument: &str| {
        Command::new(program).arg(argument).output().is_ok_and(|output| output.status.success())
    };
    if !has("nvcc", "--version") || !has("nvidia-smi", "-L") {
        eprintln!("skipped: it takes nvcc and a GPU, and this machine lacks one of them");
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = root().join("examples/cuda/outbox.cu");
    let program = compile("nvcc", &["-O1"], &source, &dir.path().join("outbox"));
    [1, 2].into_iter().for_each(|n| plays_well(&program, n, "", &[]));
}
