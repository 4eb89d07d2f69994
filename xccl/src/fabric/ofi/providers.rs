//! Which providers there are, and which one is used.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};

use super::abi;
use super::library::{Infos, Library, string};
use crate::error::{Error, Result};

/// Network hardware first, by how directly it does what an endpoint needs, then TCP.
///
/// From libfabric 2.0 on `tcp` has reliable datagrams of its own; before that `ofi_rxm` makes them of connections.
const PREFERRED: [&str; 8] = ["cxi", "efa", "verbs;ofi_rxm", "opx", "psm2", "psm3", "tcp;ofi_rxm", "tcp"];

/// What registration may demand: an endpoint can do all of it.
const MR_MODES: i32 = abi::MR_LOCAL | abi::MR_VIRT_ADDR | abi::MR_ALLOCATED | abi::MR_PROV_KEY | abi::MR_ENDPOINT;

/// Bytes of an immediate.
const IMMEDIATE: usize = 4;

/// A network provider of libfabric, as `xccl info` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkProvider {
    /// Its name, which `XCCL_FABRIC` takes.
    pub name: String,
    /// Whether it is the one that is used.
    pub chosen: bool,
    /// The network devices that it can use.
    pub devices: Vec<String>,
    /// Why it is not used.
    pub passed_over: Option<String>,
}

/// Every provider of this machine, the best first. `wanted` as in [`choose`].
pub(crate) fn providers(wanted: Option<&str>) -> Result<Vec<NetworkProvider>> {
    let library = Library::get()?;
    let able = able(library)?;
    let everything = library.getinfo(None)?;
    let mut found: BTreeMap<String, (Vec<String>, Vec<String>)> = BTreeMap::new();
    for info in able.iter().chain(everything.iter()) {
        let (devices, _) = found.entry(name_of(info)).or_default();
        let device = device_of(info);
        if !devices.contains(&device) {
            devices.push(device);
        }
    }
    for info in everything.iter() {
        if let Some((_, lacks)) = found.get_mut(&name_of(info)) {
            lacks.push(lacks_of(info));
        }
    }
    let best = pick(&able, wanted);
    let why_not = |name: &str, lacks: &[String]| {
        if !able.iter().any(|info| name_of(info) == name) {
            Some(least(lacks))
        } else if let Some(wanted) = wanted {
            Some(format!("XCCL_FABRIC asks for {wanted}"))
        } else if !PREFERRED.contains(&name) {
            Some("used only where XCCL_FABRIC names it".to_owned())
        } else {
            best.as_ref().map(|best| format!("{best} is preferred"))
        }
    };
    let mut list: Vec<_> = found
        .into_iter()
        .map(|(name, (devices, lacks))| {
            let chosen = best.as_ref() == Some(&name);
            let passed_over = if chosen { None } else { why_not(&name, &lacks) };
            NetworkProvider { name, chosen, devices, passed_over }
        })
        .collect();
    list.sort_by_key(|p| (!p.chosen, preference(&p.name)));
    Ok(list)
}

/// The place on the network that is used: `wanted` names a provider, and none leaves it to [`PREFERRED`]; where addresses are
/// those of IP, it is the one with the address `source`.
///
/// # Errors
/// [`Error::FabricProvider`] says what the named provider lacks and which ones would do, or which addresses there are.
pub(super) fn choose(wanted: Option<&str>, source: Option<IpAddr>) -> Result<Infos> {
    let library = Library::get()?;
    let able = able(library)?;
    let refused = |why: String| Error::FabricProvider { wanted: wanted.unwrap_or("auto").to_owned(), why };
    let Some(name) = pick(&able, wanted) else {
        return Err(refused(why_none(library, &able, wanted)?));
    };
    let places = || able.iter().filter(|info| name_of(info) == name);
    let place = match source {
        None => places().next(),
        Some(source) => places().find(|info| ip_of(info).is_none_or(|ip| ip == source)),
    };
    match place {
        Some(info) => able.copy_of(info),
        None => {
            let addresses: Vec<_> = places().filter_map(ip_of).map(|ip| ip.to_string()).collect();
            let source = source.map_or(String::new(), |s| s.to_string());
            Err(refused(format!("{name} cannot use the address {source}, only {}", addresses.join(", "))))
        }
    }
}

/// The places that have all an endpoint needs.
fn able(library: &'static Library) -> Result<Infos> {
    let hints = library.hints()?;
    // SAFETY: `hints` has all its parts, as `fi_allocinfo` makes them, and nobody else has it.
    unsafe {
        let info = &mut *hints.as_ptr();
        info.caps = abi::RMA;
        (*info.ep_attr).type_ = abi::EP_RDM;
        let domain = &mut *info.domain_attr;
        domain.threading = abi::THREAD_DOMAIN;
        domain.control_progress = abi::PROGRESS_MANUAL;
        domain.data_progress = abi::PROGRESS_MANUAL;
        domain.resource_mgmt = abi::RM_ENABLED;
        domain.mr_mode = MR_MODES;
        domain.cq_data_size = IMMEDIATE;
        // No mode bits: contexts are numbers here, not memory that a provider could write.
    }
    library.getinfo(Some(&hints))
}

/// The name of the provider that is used, if there is one.
fn pick(able: &Infos, wanted: Option<&str>) -> Option<String> {
    let has = |name: &str| able.iter().any(|info| name_of(info) == name);
    match wanted {
        // `tcp` and `verbs` have connections only, up to libfabric 1.x: their users mean the layer above too.
        Some(name) => [name.to_owned(), format!("{name};ofi_rxm")].into_iter().find(|n| has(n)),
        None => PREFERRED.into_iter().find(|n| has(n)).map(str::to_owned),
    }
}

fn preference(name: &str) -> usize {
    PREFERRED.iter().position(|p| *p == name).unwrap_or(PREFERRED.len())
}

fn why_none(library: &'static Library, able: &Infos, wanted: Option<&str>) -> Result<String> {
    let mut good: Vec<_> = able.iter().map(name_of).collect();
    good.sort_by_key(|name| preference(name));
    good.dedup();
    let good = if good.is_empty() { "none here".to_owned() } else { good.join(", ") };
    let Some(wanted) = wanted else {
        return Ok(format!(
            "those with reliable datagrams and remote writes: {good}; the usual ones: {}",
            PREFERRED.join(", ")
        ));
    };
    let everything = library.getinfo(None)?;
    let lacks: Vec<_> = everything.iter().filter(|info| name_of(info) == wanted).map(lacks_of).collect();
    let about = if lacks.is_empty() { "is not among this machine's providers".to_owned() } else { least(&lacks) };
    Ok(format!("{wanted} {about}; providers that have all that is needed: {good}"))
}

/// What an endpoint needs and this place does not have.
fn lacks_of(info: &abi::Info) -> String {
    // SAFETY: entries of `fi_getinfo` have all their parts.
    let (ep, domain) = unsafe { (&*info.ep_attr, &*info.domain_attr) };
    let checks = [
        (ep.type_ == abi::EP_RDM, "reliable datagrams (FI_EP_RDM)"),
        (info.caps & abi::RMA != 0, "remote writes (FI_RMA)"),
        (domain.cq_data_size >= IMMEDIATE, "immediates of 4 bytes (cq_data_size)"),
    ];
    let lacks: Vec<_> = checks.iter().filter(|(has, _)| !has).map(|&(_, what)| what).collect();
    match lacks.is_empty() {
        true => "asks for a mode of use that is not supported".to_owned(),
        false => format!("lacks {}", lacks.join(", ")),
    }
}

/// Of what a provider's places lack, the shortest.
fn least(lacks: &[String]) -> String {
    lacks.iter().min_by_key(|l| l.len()).cloned().unwrap_or_default()
}

pub(super) fn name_of(info: &abi::Info) -> String {
    // SAFETY: entries of `fi_getinfo` have all their parts.
    string(unsafe { (*info.fabric_attr).prov_name })
}

fn device_of(info: &abi::Info) -> String {
    // SAFETY: entries of `fi_getinfo` have all their parts.
    let domain = string(unsafe { (*info.domain_attr).name });
    match ip_of(info) {
        Some(ip) => format!("{domain} ({ip})"),
        None => domain,
    }
}

/// The address of a place, where it is one of IP.
fn ip_of(info: &abi::Info) -> Option<IpAddr> {
    if info.src_addr.is_null() {
        return None;
    }
    // SAFETY: `src_addr` has `src_addrlen` bytes.
    let address = unsafe { std::slice::from_raw_parts(info.src_addr.cast::<u8>(), info.src_addrlen) };
    socket_address(info.addr_format, address).map(|address| address.ip())
}

/// What a `sockaddr_in` or `sockaddr_in6` says; `None` for other formats, and for bytes that are neither.
pub(super) fn socket_address(format: u32, bytes: &[u8]) -> Option<SocketAddr> {
    let field = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    let family = libc::c_int::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
    match (format, family) {
        (abi::SOCKADDR_IN, libc::AF_INET) if bytes.len() == size_of::<libc::sockaddr_in>() => {
            let port = u16::from_be_bytes([bytes[2], bytes[3]]);
            Some(SocketAddr::new(Ipv4Addr::from(field(4)).into(), port))
        }
        (abi::SOCKADDR_IN6, libc::AF_INET6) if bytes.len() == size_of::<libc::sockaddr_in6>() => {
            let port = u16::from_be_bytes([bytes[2], bytes[3]]);
            let mut ip = [0; 16];
            ip.copy_from_slice(&bytes[8..24]);
            let (flow, scope) = (u32::from_be_bytes(field(4)), u32::from_ne_bytes(field(24)));
            Some(SocketAddrV6::new(ip.into(), port, flow, scope).into())
        }
        _ => None,
    }
}

/// Whether a provider speaks TCP, so that anybody may ask its port whether it is there.
pub(super) fn speaks_tcp(provider: &str) -> bool {
    matches!(provider.split(';').next(), Some("tcp" | "net"))
}
