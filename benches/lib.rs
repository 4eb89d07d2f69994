//! Micro-benchmarks of XCCL: `cargo bench -p xccl-benches`. Exchanges between processes are measured by `xccl bench`, peers
//! by the programs in `peers/`.
