//! What calls cost when nobody has to be waited for: one rank, its own peer.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use xccl::{Communicator, Config, DType, Moe, MoeConfig, Result, Routing, UniqueId};
use xccl_c::{
    XCCL_UNIQUE_ID_BYTES, xcclCommInitRank, xcclCommUserRank, xcclGetUniqueId, xcclRecv, xcclResult_t, xcclSend,
    xcclUniqueId,
};

const HIDDEN: usize = 7168;
const TOPK: usize = 8;
const EXPERTS: usize = 256;

fn alone() -> Result<Communicator> {
    Communicator::init(0, 1, &UniqueId::new()?, Config::default())
}

fn send_and_receive(c: &mut Criterion) {
    let comm = alone().expect("one rank can always start");
    c.bench_function("send and recv, 8 bytes to itself", |b| {
        let mut buffer = [0; 8];
        b.iter(|| {
            comm.send(0, 1, &[1; 8]).and_then(|()| comm.recv(0, 1, &mut buffer)).expect("nothing to wait for");
        });
    });
}

/// What the C ABI adds to a call: handle and pointers checked, panics caught, the result turned into a code.
fn across_the_c_abi(c: &mut Criterion) {
    use std::ptr::null_mut;
    let mut group = c.benchmark_group("C ABI");
    let rust = alone().expect("one rank can always start");
    let (mut comm, mut id) = (null_mut(), xcclUniqueId { internal: [0; XCCL_UNIQUE_ID_BYTES] });
    // SAFETY: the pointers are to values of the right types.
    let made = unsafe { (xcclGetUniqueId(&mut id), xcclCommInitRank(&mut comm, 1, id, 0)) };
    assert_eq!(made, (xcclResult_t::xcclSuccess, xcclResult_t::xcclSuccess));

    let mut rank = 0;
    group.bench_function("rank, Rust", |b| b.iter(|| std::hint::black_box(&rust).rank()));
    // SAFETY: the handle is good and `rank` may be written.
    group.bench_function("rank, C", |b| b.iter(|| unsafe { xcclCommUserRank(std::hint::black_box(comm), &mut rank) }));

    let (data, mut buffer) = ([1u8; 8], [0u8; 8]);
    group.bench_function("send and recv, Rust", |b| {
        b.iter(|| rust.send(0, 1, &data).and_then(|()| rust.recv(0, 1, &mut buffer)).expect("nothing to wait for"));
    });
    group.bench_function("send and recv, C", |b| {
        // SAFETY: the handle is good, and the buffers are as long as the calls are told.
        b.iter(|| unsafe {
            xcclSend(data.as_ptr().cast(), 8, 0, 1, comm);
            xcclRecv(buffer.as_mut_ptr().cast(), 8, 0, 1, null_mut(), comm)
        });
    });
}

/// Beside each exchange the plain copy of its token rows.
fn exchange(c: &mut Criterion) {
    let comm = alone().expect("one rank can always start");
    let mut group = c.benchmark_group("dispatch and combine in place");
    for tokens in [1usize, 8, 128] {
        let moe = Moe::new(&comm, MoeConfig::new(tokens, HIDDEN, TOPK, EXPERTS, DType::BF16)).expect("a usable shape");
        let rows = vec![bf16::ONE; tokens * HIDDEN];
        let ids: Vec<i32> = (0..tokens * TOPK).map(|i| (i * 31 % EXPERTS) as i32).collect();
        let weights = vec![0.125; ids.len()];
        let routing = Routing::new(&ids, &weights);
        let mut out = vec![bf16::ZERO; rows.len()];
        group.throughput(Throughput::Bytes((rows.len() * 2) as u64));
        group.bench_with_input(BenchmarkId::new("xccl", tokens), &rows, |b, rows| {
            b.iter(|| {
                let sent = moe.dispatch_send(rows, &routing)?;
                let batch = moe.dispatch_recv(&sent)?;
                moe.combine_send(batch)?;
                moe.combine_recv(sent, &mut out)
            });
        });
        group.bench_with_input(BenchmarkId::new("memcpy of the rows", tokens), &rows, |b, rows| {
            let mut to = rows.clone();
            b.iter(|| to.copy_from_slice(std::hint::black_box(rows)));
        });
    }
}

criterion_group!(benches, send_and_receive, across_the_c_abi, exchange);
criterion_main!(benches);
