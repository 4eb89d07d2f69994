//! Where the ranks of a communicator meet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::UniqueId;
use super::reserved;
use super::tcp::Listener;
use crate::error::{Error, Result};

/// How long rank 0 tries to get a port that somebody has: an earlier communicator of the same job may be about to give it up.
const FOR_THE_PORT: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(20);

/// The host and port at which rank 0 waits for the ranks of other hosts, as a launcher's environment tells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Address(SocketAddr),
    /// The name is resolved when it is needed, and again until it can be: in a cluster, names may appear after processes.
    Name(String, u16),
}

impl Place {
    /// Takes an address or a name; IPv6 addresses with or without brackets.
    pub(crate) fn new(host: &str, port: u16) -> Place {
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        match bare.parse::<IpAddr>() {
            Ok(ip) => Place::Address(SocketAddr::new(ip, port)),
            // A scope makes it an address of sockets, and of nothing else.
            Err(_) => match format!("[{bare}]:{port}").parse() {
                Ok(address) => Place::Address(address),
                Err(_) => Place::Name(bare.to_string(), port),
            },
        }
    }

    /// The addresses to try, in this order. Asks the system's resolver, which has its own deadline.
    pub(super) fn addresses(&self) -> std::io::Result<Vec<SocketAddr>> {
        match self {
            Place::Address(address) => Ok(vec![*address]),
            Place::Name(name, port) => Ok((name.as_str(), *port).to_socket_addrs()?.collect()),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Address(address) => address.fmt(f),
            Place::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

/// What it takes to join: the id, and where rank 0 waits unless all ranks are on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Rendezvous {
    pub(super) id: UniqueId,
    pub(super) place: Option<Place>,
}

impl From<&UniqueId> for Rendezvous {
    fn from(id: &UniqueId) -> Self {
        Rendezvous { id: *id, place: id.address().map(Place::Address) }
    }
}

impl Rendezvous {
    /// The id may come from a job, and so lack the place that the environment tells.
    pub(crate) fn new(id: UniqueId, place: Option<Place>) -> Self {
        Rendezvous { id, place }
    }

    pub(crate) fn id(&self) -> &UniqueId {
        &self.id
    }

    /// Rank 0 takes the address at which it waits.
    pub(super) fn listen(&self, place: &Place, deadline: Instant) -> Result<Listener> {
        if let Some(listener) = reserved::claim(&self.id.token()) {
            return Ok(listener);
        }
        let candidates = match place {
            Place::Address(address) => vec![*address],
            // What a host's own name means there is often 127.0.1.1, which the others do not reach.
            Place::Name(name, port) if name != "localhost" => vec![
                SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), *port),
                SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), *port),
            ],
            Place::Name(..) => {
                place.addresses().map_err(|source| Error::CannotListen { address: place.to_string(), source })?
            }
        };
        let until = deadline.min(Instant::now() + FOR_THE_PORT);
        loop {
            let source = match first_that_can_be_bound(&candidates) {
                Ok(listener) => return Ok(listener),
                Err(source) => source,
            };
            if source.kind() != std::io::ErrorKind::AddrInUse || Instant::now() >= until {
                return Err(Error::CannotListen { address: place.to_string(), source });
            }
            std::thread::sleep(RETRY);
        }
    }
}

/// A host may lack one of the two families. That an address is in use is an answer, though: the others would not find who
/// waits at another one.
fn first_that_can_be_bound(candidates: &[SocketAddr]) -> std::io::Result<Listener> {
    let mut last = std::io::ErrorKind::AddrNotAvailable.into();
    for &candidate in candidates {
        match Listener::bind(candidate) {
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => last = error,
            outcome => return outcome,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_or_a_name() {
        let address = |text: &str| Place::Address(text.parse().unwrap());
        for (host, place) in [
            ("10.0.0.1", address("10.0.0.1:7")),
            ("2001:db8::1", address("[2001:db8::1]:7")),
            ("[2001:db8::1]", address("[2001:db8::1]:7")),
            ("fe80::1%2", address("[fe80::1%2]:7")),
            ("node-0.example", Place::Name("node-0.example".to_string(), 7)),
        ] {
            assert_eq!(Place::new(host, 7), place);
        }
    }

    #[test]
    fn a_port_in_use_is_an_error_that_says_what_to_choose() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let id = UniqueId::new_at(other.local_addr().unwrap()).unwrap();
        let rendezvous = Rendezvous::from(&id);
        let place = rendezvous.place.clone().unwrap();
        let error = rendezvous.listen(&place, Instant::now()).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::CannotListen { .. }), "{text}");
        assert!(text.contains("XCCL_MASTER_PORT") && text.contains(&place.to_string()), "{text}");
        // As soon as it is free it is taken.
        let freed = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(other);
        });
        rendezvous.listen(&place, Instant::now() + Duration::from_secs(20)).unwrap();
        freed.join().unwrap();
    }

    #[test]
    fn an_address_of_another_host_cannot_be_listened_at() {
        // Of a range kept for documentation (RFC 5737), so nobody's.
        let id = UniqueId::new_at("198.51.100.1:7".parse().unwrap()).unwrap();
        let rendezvous = Rendezvous::from(&id);
        let place = rendezvous.place.clone().unwrap();
        let error = rendezvous.listen(&place, Instant::now() + Duration::from_secs(20)).err().unwrap();
        assert!(error.to_string().contains("no address of this host"), "{error}");
    }
}
