//! UDP relays between the processes of a cluster on one machine, to cut cables and lose packets that real ones exchange.
//!
//! A relay stands before the router and before every decode node: whoever wants to reach those is given the relay's address.
//! Datagrams pass as they are, or not at all; nothing in them is understood (they are encrypted). Read [`Relays`].

use ridge_sim::Random;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How often a relay looks whether it is still wanted.
const POLL: Duration = Duration::from_millis(100);
/// A way back that was silent for so long is given up; the next datagram opens another.
const IDLE: Duration = Duration::from_secs(20);
/// No datagram is longer.
const DATAGRAM_BYTES_MAX: usize = 1 << 16;

/// The relays of one cluster. They end when this is dropped.
#[derive(Debug)]
pub struct Relays {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fronts: BTreeMap<String, Front>,
    rules: Mutex<Rules>,
    over: AtomicBool,
}

#[derive(Debug)]
struct Front {
    /// What peers talk to.
    socket: UdpSocket,
    addr: SocketAddr,
}

#[derive(Debug)]
struct Rules {
    /// Where everybody is.
    places: BTreeMap<String, SocketAddr>,
    /// Pairs between which nothing passes, in both directions.
    cut: BTreeSet<(String, String)>,
    /// Datagrams of a thousand that are lost.
    loss_permille: u64,
    random: Random,
    dropped: u64,
}

impl Relays {
    /// Relays before these processes.
    pub fn start(names: &[String], seed: u64) -> io::Result<Arc<Self>> {
        let mut fronts = BTreeMap::new();
        for name in names {
            let socket = bind()?;
            let addr = socket.local_addr()?;
            fronts.insert(name.clone(), Front { socket, addr });
        }
        let rules = Rules {
            places: BTreeMap::new(),
            cut: BTreeSet::new(),
            loss_permille: 0,
            random: Random::new(seed, 1),
            dropped: 0,
        };
        let shared = Arc::new(Shared { fronts, rules: Mutex::new(rules), over: AtomicBool::new(false) });
        for name in names {
            let (shared, name) = (shared.clone(), name.clone());
            std::thread::Builder::new().name("relay".into()).spawn(move || carry_in(&shared, &name))?;
        }
        Ok(Arc::new(Self { shared }))
    }

    /// The address that stands for a process, if it has a relay.
    pub fn front(&self, name: &str) -> Option<SocketAddr> {
        self.shared.fronts.get(name).map(|front| front.addr)
    }

    /// Says where everybody is now.
    pub fn place<'a>(&self, places: impl Iterator<Item = (&'a str, SocketAddr)>) {
        self.shared.rules().places = places.map(|(name, addr)| (name.to_owned(), addr)).collect();
    }

    /// Lets nothing pass between two processes, or everything again.
    pub fn cut(&self, one: &str, other: &str, cut: bool) {
        let pair = pair(one, other);
        let mut rules = self.shared.rules();
        if cut {
            rules.cut.insert(pair)
        } else {
            rules.cut.remove(&pair)
        };
    }

    /// Loses so many of a thousand datagrams, everywhere.
    pub fn lose(&self, permille: u64) {
        self.shared.rules().loss_permille = permille;
    }

    /// Datagrams that did not pass.
    pub fn dropped(&self) -> u64 {
        self.shared.rules().dropped
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

impl Rules {
    /// Whether a datagram between `peer` and the process called `name` passes.
    fn pass(&mut self, peer: SocketAddr, name: &str) -> bool {
        let cut = !self.cut.is_empty()
            && self.places.iter().any(|(other, addr)| *addr == peer && self.cut.contains(&pair(other, name)));
        let lost = cut || self.loss_permille > 0 && self.random.chance(self.loss_permille);
        self.dropped += u64::from(lost);
        !lost
    }
}

fn pair(one: &str, other: &str) -> (String, String) {
    (one.min(other).to_owned(), one.max(other).to_owned())
}

fn bind() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(POLL))?;
    Ok(socket)
}

/// From peers to the process behind the relay.
fn carry_in(shared: &Arc<Shared>, name: &str) {
    let front = &shared.fronts[name].socket;
    // A peer is known to the process behind by a socket of its own.
    let mut ways: BTreeMap<(SocketAddr, SocketAddr), Weak<UdpSocket>> = BTreeMap::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    while !shared.is_over() {
        let Ok((len, peer)) = front.recv_from(&mut buffer) else { continue };
        let (passes, target) = {
            let mut rules = shared.rules();
            (rules.pass(peer, name), rules.places.get(name).copied())
        };
        let Some(target) = target.filter(|_| passes) else { continue };
        let way = match ways.get(&(peer, target)).and_then(Weak::upgrade) {
            Some(way) => way,
            None => {
                let Ok(way) = open_way(shared, name, peer, target) else { continue };
                ways.retain(|_, way| way.strong_count() > 0);
                ways.insert((peer, target), Arc::downgrade(&way));
                way
            }
        };
        // Nobody behind is the same as a lost datagram.
        let _ = way.send(&buffer[..len]);
    }
}

/// A socket towards the process, and a thread that carries its answers back to the peer.
fn open_way(shared: &Arc<Shared>, name: &str, peer: SocketAddr, target: SocketAddr) -> io::Result<Arc<UdpSocket>> {
    let way = bind()?;
    way.connect(target)?;
    let way = Arc::new(way);
    let (shared, name, back) = (shared.clone(), name.to_owned(), way.clone());
    std::thread::Builder::new().name("relay".into()).spawn(move || carry_back(&shared, &name, peer, &back))?;
    Ok(way)
}

fn carry_back(shared: &Shared, name: &str, peer: SocketAddr, way: &UdpSocket) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut last = Instant::now();
    while !shared.is_over() && last.elapsed() < IDLE {
        match way.recv(&mut buffer) {
            Ok(len) => {
                last = Instant::now();
                if shared.rules().pass(peer, name) {
                    let _ = shared.fronts[name].socket.send_to(&buffer[..len], peer);
                }
            }
            // A dead process is told by ICMP, again and again: no reason to spin.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::thread::sleep(POLL / 10),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn socket() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        socket.set_read_timeout(Some(LONG)).expect("a timeout");
        let addr = socket.local_addr().expect("is bound");
        (socket, addr)
    }

    fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 64];
        let (len, from) = socket.recv_from(&mut buffer).expect("a datagram");
        (buffer[..len].to_vec(), from)
    }

    #[test]
    fn datagrams_pass_both_ways_until_the_cable_is_cut() {
        let relays = Relays::start(&["b".to_owned()], 1).expect("starts");
        let front = relays.front("b").expect("has one");
        assert_eq!(relays.front("a"), None);
        let ((a, a_addr), (b, b_addr)) = (socket(), socket());
        relays.place([("a", a_addr), ("b", b_addr)].into_iter());
        a.send_to(b"there", front).expect("sends");
        let (text, from) = receive(&b);
        assert_eq!(text, b"there");
        b.send_to(b"back", from).expect("sends");
        assert_eq!(receive(&a), (b"back".to_vec(), front));

        relays.cut("b", "a", true);
        a.send_to(b"lost", front).expect("sends");
        let deadline = Instant::now() + LONG;
        while relays.dropped() == 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(relays.dropped(), 1);
        relays.cut("a", "b", false);
        a.send_to(b"again", front).expect("sends");
        assert_eq!(receive(&b).0, b"again", "what was cut off does not come later");

        relays.lose(1000);
        b.send_to(b"lost", from).expect("sends");
        while relays.dropped() == 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(relays.dropped(), 2);
    }
}
