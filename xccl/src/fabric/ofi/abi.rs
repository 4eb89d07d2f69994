//! The part of libfabric's C interface that the endpoint uses, as version 1.17 has it (`rdma/fabric.h` and its neighbours).
//!
//! Names are C's without `fi_`, fields are in C's order. Tables of functions end at the last function that is called: they are
//! only ever seen by pointer, and say their size themselves. `tests` compares every layout and number with the installed headers.

use std::ffi::{c_char, c_int, c_void};

/// The version whose layouts these are, and the oldest that is accepted.
pub(super) const VERSION: u32 = version(1, 17);

pub(super) const fn version(major: u32, minor: u32) -> u32 {
    major << 16 | minor
}

pub(super) const RMA: u64 = 1 << 2;
pub(super) const READ: u64 = 1 << 8;
pub(super) const WRITE: u64 = 1 << 9;
pub(super) const RECV: u64 = 1 << 10;
pub(super) const TRANSMIT: u64 = 1 << 11;
pub(super) const REMOTE_READ: u64 = 1 << 12;
pub(super) const REMOTE_WRITE: u64 = 1 << 13;
pub(super) const REMOTE_CQ_DATA: u64 = 1 << 17;
pub(super) const COMPLETION: u64 = 1 << 24;
pub(super) const SELECTIVE_COMPLETION: u64 = 1 << 59;

pub(super) const MR_LOCAL: c_int = 1 << 2;
pub(super) const MR_VIRT_ADDR: c_int = 1 << 4;
pub(super) const MR_ALLOCATED: c_int = 1 << 5;
pub(super) const MR_PROV_KEY: c_int = 1 << 6;
pub(super) const MR_ENDPOINT: c_int = 1 << 9;

pub(super) const SOCKADDR_IN: u32 = 2;
pub(super) const SOCKADDR_IN6: u32 = 3;

pub(super) const AV_TABLE: c_int = 2;
pub(super) const PROGRESS_MANUAL: c_int = 2;
pub(super) const THREAD_DOMAIN: c_int = 3;
pub(super) const RM_ENABLED: c_int = 2;
pub(super) const EP_RDM: c_int = 3;

pub(super) const GETWAIT: c_int = 5;
pub(super) const ENABLE: c_int = 6;

pub(super) const WAIT_NONE: c_int = 0;
pub(super) const WAIT_FD: c_int = 3;
pub(super) const CQ_FORMAT_DATA: c_int = 3;

pub(super) const KEY_NOTAVAIL: u64 = u64::MAX;

pub(super) const EAGAIN: i64 = 11;
/// As the entries of completion queues have it.
pub(super) const ECANCELED: c_int = 125;
pub(super) const ENODATA: i64 = 61;
pub(super) const EAVAIL: i64 = 259;
pub(super) const ENOKEY: i64 = 266;

#[repr(C)]
pub(super) struct TxAttr {
    pub(super) caps: u64,
    pub(super) mode: u64,
    pub(super) op_flags: u64,
    pub(super) msg_order: u64,
    pub(super) comp_order: u64,
    pub(super) inject_size: usize,
    pub(super) size: usize,
    pub(super) iov_limit: usize,
    pub(super) rma_iov_limit: usize,
    pub(super) tclass: u32,
}

#[repr(C)]
pub(super) struct EpAttr {
    pub(super) type_: c_int,
    pub(super) protocol: u32,
    pub(super) protocol_version: u32,
    pub(super) max_msg_size: usize,
    pub(super) msg_prefix_size: usize,
    pub(super) max_order_raw_size: usize,
    pub(super) max_order_war_size: usize,
    pub(super) max_order_waw_size: usize,
    pub(super) mem_tag_format: u64,
    pub(super) tx_ctx_cnt: usize,
    pub(super) rx_ctx_cnt: usize,
    pub(super) auth_key_size: usize,
    pub(super) auth_key: *mut u8,
}

#[repr(C)]
pub(super) struct DomainAttr {
    pub(super) domain: *mut FidDomain,
    pub(super) name: *mut c_char,
    pub(super) threading: c_int,
    pub(super) control_progress: c_int,
    pub(super) data_progress: c_int,
    pub(super) resource_mgmt: c_int,
    pub(super) av_type: c_int,
    pub(super) mr_mode: c_int,
    pub(super) mr_key_size: usize,
    pub(super) cq_data_size: usize,
    pub(super) cq_cnt: usize,
    pub(super) ep_cnt: usize,
    pub(super) tx_ctx_cnt: usize,
    pub(super) rx_ctx_cnt: usize,
    pub(super) max_ep_tx_ctx: usize,
    pub(super) max_ep_rx_ctx: usize,
    pub(super) max_ep_stx_ctx: usize,
    pub(super) max_ep_srx_ctx: usize,
    pub(super) cntr_cnt: usize,
    pub(super) mr_iov_limit: usize,
    pub(super) caps: u64,
    pub(super) mode: u64,
    pub(super) auth_key: *mut u8,
    pub(super) auth_key_size: usize,
    pub(super) max_err_data: usize,
    pub(super) mr_cnt: usize,
    pub(super) tclass: u32,
}

#[repr(C)]
pub(super) struct FabricAttr {
    pub(super) fabric: *mut FidFabric,
    pub(super) name: *mut c_char,
    pub(super) prov_name: *mut c_char,
    pub(super) prov_version: u32,
    pub(super) api_version: u32,
}

#[repr(C)]
pub(super) struct Info {
    pub(super) next: *mut Info,
    pub(super) caps: u64,
    pub(super) mode: u64,
    pub(super) addr_format: u32,
    pub(super) src_addrlen: usize,
    pub(super) dest_addrlen: usize,
    pub(super) src_addr: *mut c_void,
    pub(super) dest_addr: *mut c_void,
    pub(super) handle: *mut Fid,
    pub(super) tx_attr: *mut TxAttr,
    pub(super) rx_attr: *mut c_void,
    pub(super) ep_attr: *mut EpAttr,
    pub(super) domain_attr: *mut DomainAttr,
    pub(super) fabric_attr: *mut FabricAttr,
    pub(super) nic: *mut c_void,
}

#[repr(C)]
pub(super) struct Fid {
    pub(super) fclass: usize,
    pub(super) context: *mut c_void,
    pub(super) ops: *const Ops,
}

#[repr(C)]
pub(super) struct Ops {
    pub(super) size: usize,
    pub(super) close: unsafe extern "C" fn(*mut Fid) -> c_int,
    pub(super) bind: unsafe extern "C" fn(*mut Fid, *mut Fid, u64) -> c_int,
    pub(super) control: unsafe extern "C" fn(*mut Fid, c_int, *mut c_void) -> c_int,
}

/// A function of a table that is not called here.
type Unused = *const c_void;

#[repr(C)]
pub(super) struct OpsFabric {
    pub(super) size: usize,
    pub(super) domain: unsafe extern "C" fn(*mut FidFabric, *mut Info, *mut *mut FidDomain, *mut c_void) -> c_int,
    passive_ep: Unused,
    eq_open: Unused,
    wait_open: Unused,
    pub(super) trywait: unsafe extern "C" fn(*mut FidFabric, *mut *mut Fid, c_int) -> c_int,
}

#[repr(C)]
pub(super) struct FidFabric {
    pub(super) fid: Fid,
    pub(super) ops: *const OpsFabric,
    pub(super) api_version: u32,
}

#[repr(C)]
pub(super) struct OpsDomain {
    pub(super) size: usize,
    pub(super) av_open: unsafe extern "C" fn(*mut FidDomain, *mut AvAttr, *mut *mut FidAv, *mut c_void) -> c_int,
    pub(super) cq_open: unsafe extern "C" fn(*mut FidDomain, *mut CqAttr, *mut *mut FidCq, *mut c_void) -> c_int,
    pub(super) endpoint: unsafe extern "C" fn(*mut FidDomain, *mut Info, *mut *mut FidEp, *mut c_void) -> c_int,
}

#[repr(C)]
pub(super) struct OpsMr {
    pub(super) size: usize,
    pub(super) reg: unsafe extern "C" fn(
        *mut Fid,
        *const c_void,
        usize,
        access: u64,
        offset: u64,
        requested_key: u64,
        flags: u64,
        *mut *mut FidMr,
        *mut c_void,
    ) -> c_int,
}

#[repr(C)]
pub(super) struct FidDomain {
    pub(super) fid: Fid,
    pub(super) ops: *const OpsDomain,
    pub(super) mr: *const OpsMr,
}

#[repr(C)]
pub(super) struct FidMr {
    pub(super) fid: Fid,
    pub(super) mem_desc: *mut c_void,
    pub(super) key: u64,
}

#[repr(C)]
pub(super) struct AvAttr {
    pub(super) type_: c_int,
    pub(super) rx_ctx_bits: c_int,
    pub(super) count: usize,
    pub(super) ep_per_node: usize,
    pub(super) name: *const c_char,
    pub(super) map_addr: *mut c_void,
    pub(super) flags: u64,
}

#[repr(C)]
pub(super) struct OpsAv {
    pub(super) size: usize,
    pub(super) insert:
        unsafe extern "C" fn(*mut FidAv, *const c_void, count: usize, *mut u64, flags: u64, *mut c_void) -> c_int,
}

#[repr(C)]
pub(super) struct FidAv {
    pub(super) fid: Fid,
    pub(super) ops: *const OpsAv,
}

#[repr(C)]
pub(super) struct CqAttr {
    pub(super) size: usize,
    pub(super) flags: u64,
    pub(super) format: c_int,
    pub(super) wait_obj: c_int,
    pub(super) signaling_vector: c_int,
    pub(super) wait_cond: c_int,
    pub(super) wait_set: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CqDataEntry {
    pub(super) op_context: *mut c_void,
    pub(super) flags: u64,
    pub(super) len: usize,
    pub(super) buf: *mut c_void,
    pub(super) data: u64,
}

#[repr(C)]
pub(super) struct CqErrEntry {
    pub(super) op_context: *mut c_void,
    pub(super) flags: u64,
    pub(super) len: usize,
    pub(super) buf: *mut c_void,
    pub(super) data: u64,
    pub(super) tag: u64,
    pub(super) olen: usize,
    pub(super) err: c_int,
    pub(super) prov_errno: c_int,
    pub(super) err_data: *mut c_void,
    pub(super) err_data_size: usize,
}

#[repr(C)]
pub(super) struct OpsCq {
    pub(super) size: usize,
    pub(super) read: unsafe extern "C" fn(*mut FidCq, *mut c_void, count: usize) -> isize,
    readfrom: Unused,
    pub(super) readerr: unsafe extern "C" fn(*mut FidCq, *mut CqErrEntry, flags: u64) -> isize,
    sread: Unused,
    sreadfrom: Unused,
    signal: Unused,
    pub(super) strerror:
        unsafe extern "C" fn(*mut FidCq, prov_errno: c_int, *const c_void, *mut c_char, usize) -> *const c_char,
}

#[repr(C)]
pub(super) struct FidCq {
    pub(super) fid: Fid,
    pub(super) ops: *const OpsCq,
}

#[repr(C)]
pub(super) struct OpsCm {
    pub(super) size: usize,
    setname: Unused,
    pub(super) getname: unsafe extern "C" fn(*mut Fid, *mut c_void, *mut usize) -> c_int,
}

#[repr(C)]
pub(super) struct RmaIov {
    pub(super) addr: u64,
    pub(super) len: usize,
    pub(super) key: u64,
}

#[repr(C)]
pub(super) struct MsgRma {
    pub(super) msg_iov: *const libc::iovec,
    pub(super) desc: *mut *mut c_void,
    pub(super) iov_count: usize,
    pub(super) addr: u64,
    pub(super) rma_iov: *const RmaIov,
    pub(super) rma_iov_count: usize,
    pub(super) context: *mut c_void,
    pub(super) data: u64,
}

#[repr(C)]
pub(super) struct OpsRma {
    pub(super) size: usize,
    read: Unused,
    readv: Unused,
    pub(super) readmsg: unsafe extern "C" fn(*mut FidEp, *const MsgRma, flags: u64) -> isize,
    write: Unused,
    writev: Unused,
    pub(super) writemsg: unsafe extern "C" fn(*mut FidEp, *const MsgRma, flags: u64) -> isize,
    inject: Unused,
    pub(super) writedata: unsafe extern "C" fn(
        *mut FidEp,
        *const c_void,
        len: usize,
        desc: *mut c_void,
        data: u64,
        dest_addr: u64,
        addr: u64,
        key: u64,
        context: *mut c_void,
    ) -> isize,
}

#[repr(C)]
pub(super) struct FidEp {
    pub(super) fid: Fid,
    ops: Unused,
    pub(super) cm: *const OpsCm,
    msg: Unused,
    pub(super) rma: *const OpsRma,
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::mem::offset_of;
    use std::process::{Command, Stdio};

    use super::*;

    const HEADERS: &str =
        "#include <stdio.h>\n#include <stddef.h>\n#include <rdma/fi_cm.h>\n#include <rdma/fi_rma.h>\n";

    /// C's expression, and what it should be.
    type Claim = (String, u64);

    fn size_of_field<T, F>(_: fn(&T) -> &F) -> u64 {
        size_of::<F>() as u64
    }

    /// Where the fields lie and how large they are; with `whole`, that there is nothing behind them.
    macro_rules! layout {
        ($claims:ident, whole $c:literal $rust:ident { $($field:ident),* }) => {
            $claims.push((format!("sizeof(struct {})", $c), size_of::<$rust>() as u64));
            layout!($claims, $c $rust { $($field),* });
        };
        ($claims:ident, $c:literal $rust:ident { $($field:ident),* }) => { $(
            let field = stringify!($field).trim_end_matches('_');
            $claims.push((format!("offsetof(struct {}, {field})", $c), offset_of!($rust, $field) as u64));
            $claims.push((format!("sizeof(((struct {} *)0)->{field})", $c), size_of_field(|s: &$rust| &s.$field)));
        )* };
    }

    macro_rules! constants {
        ($claims:ident, $($name:ident),*) => { $($claims.push((format!("FI_{}", stringify!($name)), $name as u64));)* };
    }

    fn claims() -> Vec<Claim> {
        let mut claims = vec![("FI_VERSION(1, 17)".to_owned(), VERSION.into())];
        constants!(claims, RMA, READ, WRITE, RECV, TRANSMIT, REMOTE_READ, REMOTE_WRITE, REMOTE_CQ_DATA, COMPLETION);
        constants!(claims, SELECTIVE_COMPLETION, MR_LOCAL, MR_VIRT_ADDR, MR_ALLOCATED, MR_PROV_KEY, MR_ENDPOINT);
        constants!(claims, SOCKADDR_IN, SOCKADDR_IN6, AV_TABLE, PROGRESS_MANUAL, THREAD_DOMAIN, RM_ENABLED, EP_RDM);
        constants!(claims, GETWAIT, ENABLE, WAIT_NONE, WAIT_FD, CQ_FORMAT_DATA, KEY_NOTAVAIL, EAGAIN, ENODATA, EAVAIL);
        constants!(claims, ECANCELED, ENOKEY);
        // What libfabric allocates: it may grow behind the fields that are named here.
        layout!(claims, "fi_tx_attr" TxAttr {
            caps, mode, op_flags, msg_order, comp_order, inject_size, size, iov_limit, rma_iov_limit, tclass
        });
        layout!(claims, "fi_ep_attr" EpAttr {
            type_, protocol, protocol_version, max_msg_size, msg_prefix_size, max_order_raw_size, max_order_war_size,
            max_order_waw_size, mem_tag_format, tx_ctx_cnt, rx_ctx_cnt, auth_key_size, auth_key
        });
        layout!(claims, "fi_domain_attr" DomainAttr {
            domain, name, threading, control_progress, data_progress, resource_mgmt, av_type, mr_mode, mr_key_size,
            cq_data_size, cq_cnt, ep_cnt, tx_ctx_cnt, rx_ctx_cnt, max_ep_tx_ctx, max_ep_rx_ctx, max_ep_stx_ctx,
            max_ep_srx_ctx, cntr_cnt, mr_iov_limit, caps, mode, auth_key, auth_key_size, max_err_data, mr_cnt, tclass
        });
        layout!(claims, "fi_fabric_attr" FabricAttr { fabric, name, prov_name, prov_version, api_version });
        layout!(claims, "fi_info" Info {
            next, caps, mode, addr_format, src_addrlen, dest_addrlen, src_addr, dest_addr, handle, tx_attr, rx_attr,
            ep_attr, domain_attr, fabric_attr, nic
        });
        layout!(claims, "fid" Fid { fclass, context, ops });
        layout!(claims, "fid_fabric" FidFabric { fid, ops, api_version });
        layout!(claims, "fid_domain" FidDomain { fid, ops, mr });
        layout!(claims, "fid_mr" FidMr { fid, mem_desc, key });
        layout!(claims, "fid_av" FidAv { fid, ops });
        layout!(claims, "fid_cq" FidCq { fid, ops });
        layout!(claims, "fid_ep" FidEp { fid, ops, cm, msg, rma });
        layout!(claims, "fi_ops" Ops { size, close, bind, control });
        layout!(claims, "fi_ops_fabric" OpsFabric { size, domain, passive_ep, eq_open, wait_open, trywait });
        layout!(claims, "fi_ops_domain" OpsDomain { size, av_open, cq_open, endpoint });
        layout!(claims, "fi_ops_mr" OpsMr { size, reg });
        layout!(claims, "fi_ops_av" OpsAv { size, insert });
        layout!(claims, "fi_ops_cq" OpsCq { size, read, readfrom, readerr, sread, sreadfrom, signal, strerror });
        layout!(claims, "fi_ops_cm" OpsCm { size, setname, getname });
        layout!(claims, "fi_ops_rma" OpsRma {
            size, read, readv, readmsg, write, writev, writemsg, inject, writedata
        });
        layout!(claims, "fi_cq_err_entry" CqErrEntry {
            op_context, flags, len, buf, data, tag, olen, err, prov_errno, err_data, err_data_size
        });
        // What is allocated here: it is as large as libfabric takes it to be.
        layout!(claims, whole "fi_av_attr" AvAttr { type_, rx_ctx_bits, count, ep_per_node, name, map_addr, flags });
        layout!(claims, whole "fi_cq_attr" CqAttr {
            size, flags, format, wait_obj, signaling_vector, wait_cond, wait_set
        });
        layout!(claims, whole "fi_cq_data_entry" CqDataEntry { op_context, flags, len, buf, data });
        layout!(claims, whole "fi_rma_iov" RmaIov { addr, len, key });
        layout!(claims, whole "fi_msg_rma" MsgRma {
            msg_iov, desc, iov_count, addr, rma_iov, rma_iov_count, context, data
        });
        claims
    }

    /// Compiles `source`; what the compiler says if it cannot.
    fn compile(source: &str, to: &std::path::Path) -> Result<(), String> {
        let mut cc = Command::new("cc");
        cc.args(["-x", "c", "-", "-o"]).arg(to).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut cc = cc.spawn().map_err(|err| format!("cc: {err}"))?;
        cc.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
        let ended = cc.wait_with_output().unwrap();
        if ended.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&ended.stderr).into_owned()) }
    }

    #[test]
    fn layouts_and_numbers_are_those_of_the_installed_headers() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("claims");
        if let Err(why) = compile(&format!("{HEADERS}int main(void) {{ return 0; }}"), &program) {
            eprintln!("skipped: without a C compiler or libfabric's headers (libfabric-dev): {why}");
            return;
        }
        let claims = claims();
        let prints: String =
            claims.iter().map(|(c, _)| format!("printf(\"%llu\\n\", (unsigned long long)({c}));\n")).collect();
        compile(&format!("{HEADERS}int main(void) {{\n{prints}return 0; }}"), &program).unwrap();
        let said = String::from_utf8(Command::new(&program).output().unwrap().stdout).unwrap();
        let said: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(said.len(), claims.len());
        let wrong: Vec<_> = claims.iter().zip(&said).filter(|((_, rust), c)| rust != *c).collect();
        assert!(wrong.is_empty(), "(C expression, here), there: {wrong:#?}");
    }
}
