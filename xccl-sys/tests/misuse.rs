//! What wrong calls get: the code, and a text that names the call and the value.

use std::ffi::{CStr, c_char, c_int};
use std::ptr::{null, null_mut};

use xccl_c::xcclResult_t::{self, *};
use xccl_c::*;

fn text(at: *const c_char) -> String {
    // SAFETY: the library's texts end with a zero and live until the next failure of this thread.
    unsafe { CStr::from_ptr(at) }.to_str().unwrap().to_owned()
}

#[track_caller]
fn refused(result: xcclResult_t, code: xcclResult_t, says: &[&str]) {
    let last = text(xcclGetLastError());
    assert_eq!(result, code, "{last}");
    says.iter().for_each(|part| assert!(last.contains(part), "{part:?} is not in {last:?}"));
}

fn comm() -> xcclComm_t {
    let mut comm = null_mut();
    let mut id = xcclUniqueId { internal: [0; XCCL_UNIQUE_ID_BYTES] };
    // SAFETY: pointers to values of the right types.
    unsafe {
        assert_eq!(xcclGetUniqueId(&mut id), xcclSuccess);
        assert_eq!(xcclCommInitRank(&mut comm, 1, id, 0), xcclSuccess, "{}", text(xcclGetLastError()));
    }
    comm
}

const CONFIG: xcclMoeConfig_t = xcclMoeConfig_t {
    size: size_of::<xcclMoeConfig_t>(),
    max_tokens: 4,
    hidden: 8,
    topk: 1,
    experts: 2,
    dtype: xcclDataType_t::xcclFloat32 as u32,
    reduction: xcclReduction_t::xcclReducePerExpert as u32,
    placement: null(),
    max_expert_rows: 0,
    smooth: null(),
    wire: 0,
    slots: 0,
    slot_experts: null(),
    shared_experts: 0,
    zero_experts: 0,
    copy_experts: 0,
    constant_experts: 0,
    constant_vectors: null(),
    constant_token_factors: null(),
    constant_vector_factors: null(),
};

#[test]
fn communicators() {
    let (mut made, mut number): (xcclComm_t, c_int) = (null_mut(), 0);
    let zeros = xcclUniqueId { internal: [0; XCCL_UNIQUE_ID_BYTES] };
    // SAFETY: pointers are null, or good for what the calls do with them.
    unsafe {
        assert_eq!((xcclGetVersion(&mut number), number), (xcclSuccess, XCCL_VERSION));
        refused(xcclGetVersion(null_mut()), xcclInvalidArgument, &["xcclGetVersion: version is a null pointer"]);
        refused(xcclGetUniqueId(null_mut()), xcclInvalidArgument, &["id is a null pointer"]);
        refused(xcclCommInitRank(null_mut(), 1, zeros, 0), xcclInvalidArgument, &["comm is a null pointer"]);
        refused(xcclCommInitRank(&mut made, 0, zeros, 0), xcclInvalidArgument, &["nranks is 0"]);
        refused(xcclCommInitRank(&mut made, 2, zeros, -3), xcclInvalidArgument, &["rank is -3", "0 to 1"]);
        refused(xcclCommInitRank(&mut made, 1, zeros, 0), xcclInvalidArgument, &["unique id", "XCCLUID2"]);
        let mut id = zeros;
        refused(xcclGetUniqueIdAt(&mut id, null()), xcclInvalidArgument, &["address is a null pointer"]);
        refused(xcclGetUniqueIdAt(&mut id, c"host:1".as_ptr()), xcclInvalidArgument, &["host:1", "10.0.0.1:29500"]);
        refused(xcclGetUniqueIdAt(&mut id, c"0.0.0.0:1".as_ptr()), xcclInvalidArgument, &["0.0.0.0:1", "connect to"]);
        assert_eq!(xcclGetUniqueIdAt(&mut id, c"[::1]:29500".as_ptr()), xcclSuccess);
        assert_eq!(xcclGetUniqueId(&mut id), xcclSuccess);
        refused(xcclCommInitRank(&mut made, 2, id, 2), xcclInvalidArgument, &["rank 2", "2 ranks"]);
        refused(xcclCommInitFromEnv(&mut made, null()), xcclNotLaunched, &["XCCL_RANK"]);
        assert!(made.is_null());

        let comm = comm();
        assert_eq!((xcclCommUserRank(comm, &mut number), number), (xcclSuccess, 0));
        assert_eq!((xcclCommCount(comm, &mut number), number), (xcclSuccess, 1));
        refused(xcclCommUserRank(null_mut(), &mut number), xcclInvalidArgument, &["comm is a null handle"]);
        refused(xcclCommCount(comm, null_mut()), xcclInvalidArgument, &["count is a null pointer"]);
        refused(xcclCommFormerRank(comm, 1, &mut number), xcclInvalidArgument, &["rank is 1", "0 to 0"]);
        refused(xcclCommShrink(comm, null_mut()), xcclInvalidArgument, &["newcomm is a null pointer"]);
        assert_eq!(xcclCommAbortWith(comm, 7, c"it is late".as_ptr()), xcclSuccess);
        assert_eq!(xcclCommAbort(comm), xcclSuccess);
        let said = &["aborted by rank 0 (code 7: it is late)"];
        refused(xcclRecv(null_mut(), 0, 0, 1, null_mut(), comm), xcclAborted, said);
        assert_eq!(xcclCommShrink(comm, &mut made), xcclSuccess);
        assert_eq!((xcclCommFormerRank(made, 0, &mut number), number), (xcclSuccess, 0));
        assert_eq!(xcclCommDestroy(made), xcclSuccess);
        assert_eq!(xcclCommDestroy(comm), xcclSuccess);
        refused(xcclCommDestroy(comm), xcclInvalidArgument, &["xcclCommDestroy: comm", "was destroyed"]);
        refused(xcclBarrier(comm), xcclInvalidArgument, &["was destroyed"]);
    }
}

#[test]
fn messages() {
    let comm = comm();
    let (data, mut buffer) = (*b"hello", [0u8; 5]);
    let mut status = xcclStatus_t { source: 9, tag: 9, bytes: 9 };
    // SAFETY: as above.
    unsafe {
        refused(xcclSend(null(), 5, 0, 1, comm), xcclInvalidArgument, &["xcclSend: data is a null pointer"]);
        refused(xcclSend(data.as_ptr().cast(), 5, 3, 1, comm), xcclInvalidArgument, &["rank 3", "1 ranks"]);
        refused(xcclSend(data.as_ptr().cast(), 5, -1, 1, comm), xcclInvalidArgument, &["peer is -1"]);
        refused(xcclSend(data.as_ptr().cast(), usize::MAX, 0, 1, comm), xcclInvalidArgument, &["data cannot have"]);
        refused(xcclSend(data.as_ptr().cast(), 5, 0, 1, null_mut()), xcclInvalidArgument, &["comm is a null"]);
        assert_eq!(xcclSend(null(), 0, 0, 2, comm), xcclSuccess);
        assert_eq!(xcclRecv(null_mut(), 0, XCCL_ANY_SOURCE, 2, null_mut(), comm), xcclSuccess);
        assert_eq!(xcclSend(data.as_ptr().cast(), 5, 0, 1, comm), xcclSuccess);
        let to = buffer.as_mut_ptr().cast();
        refused(xcclRecv(to, 5, -2, 1, null_mut(), comm), xcclInvalidArgument, &["source is -2", "ANY"]);
        refused(xcclRecv(null_mut(), 5, 0, 1, null_mut(), comm), xcclInvalidArgument, &["buffer is a null"]);
        refused(xcclRecv(to, 3, 0, 1, &mut status, comm), xcclTruncated, &["5 bytes", "3 bytes"]);
        assert_eq!(status, xcclStatus_t { source: 0, tag: 1, bytes: 5 });
        assert_eq!(xcclRecv(to, 5, XCCL_ANY_SOURCE, 1, null_mut(), comm), xcclSuccess);
        assert_eq!(buffer, data);
        assert_eq!(xcclCommDestroy(comm), xcclSuccess);
    }
}

#[test]
fn exchanges() {
    let comm = comm();
    let (tokens, ids, weights) = ([1f32, 2., 3., 4.].map(|x| [x; 8]), [1i32, 0, -1, 1], [1f32, 2., 3., 4.]);
    let (mut rows, mut counts, mut arrived, mut out) = ([[0f32; 8]; 4], [0u32; 2], 0usize, [[9f32; 8]; 4]);
    let mut moe = null_mut();
    // SAFETY: as above.
    unsafe {
        let bad = xcclMoeConfig_t { dtype: 0, ..CONFIG };
        refused(xcclMoeCreate(&mut moe, comm, &bad), xcclInvalidArgument, &["config->dtype is 0"]);
        let bad = xcclMoeConfig_t { reduction: 5, ..CONFIG };
        refused(xcclMoeCreate(&mut moe, comm, &bad), xcclInvalidArgument, &["config->reduction is 5"]);
        let bad = xcclMoeConfig_t { topk: 3, ..CONFIG };
        refused(xcclMoeCreate(&mut moe, comm, &bad), xcclInvalidArgument, &["topk", "3", "1 to 2"]);
        refused(xcclMoeCreate(&mut moe, comm, null()), xcclInvalidArgument, &["config is a null pointer"]);
        refused(xcclMoeCreate(null_mut(), comm, &CONFIG), xcclInvalidArgument, &["moe is a null pointer"]);
        refused(xcclMoeCreate(&mut moe, null_mut(), &CONFIG), xcclInvalidArgument, &["comm is a null handle"]);
        refused(xcclMoeDestroy(comm.cast()), xcclInvalidArgument, &["is not a MoE handle"]);
        assert_eq!(xcclMoeCreate(&mut moe, comm, &CONFIG), xcclSuccess);

        let (from, ids_at, weights_at) = (tokens.as_ptr().cast(), ids.as_ptr(), weights.as_ptr());
        let (to, counts_at, arrived_at) = (rows.as_mut_ptr(), counts.as_mut_ptr(), &raw mut arrived);
        let misaligned = to.cast::<u8>().add(1).cast();
        let dispatch = |count, from, ids, to, capacity, counts, arrived| {
            xcclMoeDispatch(from, count, ids, weights_at, to, capacity, counts, arrived, moe)
        };
        let (to, out_at) = (to.cast(), out.as_mut_ptr().cast());
        refused(xcclMoeCombine(to, out_at, moe), xcclInvalidUsage, &["call xcclMoeDispatch first"]);
        let bad = [9i32, 0, 1, 1];
        let invalid = xcclInvalidArgument;
        refused(dispatch(4, from, null(), to, 4, counts_at, arrived_at), invalid, &["topk_ids is a null pointer"]);
        refused(dispatch(4, null(), ids_at, to, 4, counts_at, arrived_at), invalid, &["tokens is a null pointer"]);
        refused(dispatch(4, from, ids_at, null_mut(), 4, counts_at, arrived_at), invalid, &["expert_rows is a null"]);
        refused(dispatch(4, from, ids_at, misaligned, 3, counts_at, arrived_at), invalid, &["expert_rows", "of 4"]);
        refused(dispatch(4, from, ids_at, to, 4, null_mut(), arrived_at), invalid, &["expert_counts is a null"]);
        refused(dispatch(4, from, ids_at, to, 4, counts_at, null_mut()), invalid, &["rows is a null"]);
        refused(dispatch(5, from, ids_at, to, 4, counts_at, arrived_at), invalid, &["5 tokens", "limit is 4"]);
        refused(dispatch(4, from, bad.as_ptr(), to, 4, counts_at, arrived_at), invalid, &["token 0", "expert 9"]);

        // Too little room: nothing is lost.
        refused(dispatch(4, from, ids_at, to, 2, counts_at, arrived_at), xcclTruncated, &["3 rows", "is 2"]);
        assert_eq!(arrived, 3);
        refused(xcclMoeCombine(to, out_at, moe), xcclInvalidUsage, &["xcclMoeDispatch first"]);
        refused(dispatch(3, from, ids_at, to, 4, counts_at, arrived_at), invalid, &["num_tokens is 3", "with 4"]);
        assert_eq!(dispatch(4, from, ids_at, to, 4, counts_at, arrived_at), xcclSuccess);
        assert_eq!((counts, arrived), ([1, 2], 3));
        assert_eq!(rows.map(|row| row[7]), [2., 1., 4., 0.]);

        let again = dispatch(4, from, ids_at, to, 4, counts_at, arrived_at);
        refused(again, xcclInvalidUsage, &["exchange 1 was dispatched already", "xcclMoeCombine first"]);
        refused(xcclMoeCombine(null(), out_at, moe), invalid, &["expert_outputs is a null pointer"]);
        refused(xcclMoeCombine(to, null_mut(), moe), invalid, &["out is a null pointer"]);
        assert_eq!(xcclMoeCombine(to, out_at, moe), xcclSuccess);
        assert_eq!(out.map(|row| row[0]), [1., 4., 0., 16.]);
        refused(xcclMoeCombine(to, out_at, moe), xcclInvalidUsage, &["xcclMoeDispatch first"]);

        // No tokens, no arrays; a handle in the middle of an exchange outlives its communicator and can be destroyed.
        assert_eq!(dispatch(0, null(), null(), null_mut(), 0, counts_at, arrived_at), xcclSuccess);
        assert_eq!(xcclCommDestroy(comm), xcclSuccess);
        assert_eq!(xcclMoeDestroy(moe), xcclSuccess);
        refused(xcclMoeDestroy(moe), invalid, &["xcclMoeDestroy", "was destroyed"]);
        refused(xcclMoeLocalExperts(moe, arrived_at), invalid, &["was destroyed"]);
    }
}

#[test]
fn result_texts() {
    assert_eq!(text(xcclGetErrorString(xcclSuccess as c_int)), "success");
    assert_eq!(text(xcclGetErrorString(xcclInvalidArgument as c_int)), "invalid argument");
    assert_eq!(text(xcclGetErrorString(4242)), "unknown result");
    assert_eq!(text(xcclGetLastError()), "", "nothing has failed in this thread");
}
