//! A tunnel between two namespaces whose links have no Ethernet headers, as wireguard's have none: two
//! tun devices, and a thread that carries packets from one to the other.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::namespace::Namespace;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// A packet begins with its IP header, and with nothing in front of it.
const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI;

/// A tunnel, which ends when it is dropped.
pub struct Tunnel {
    ends: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Joins two namespaces by a link of that name in each.
    pub fn new(name: &str, namespaces: [&Namespace; 2]) -> Self {
        let open = |space: &Namespace| space.run(|| open(name)).expect("tun devices need root");
        let devices = namespaces.map(open);
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let carrier = thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            while !told.load(Ordering::Relaxed) {
                carry(&devices, &mut packet);
            }
        });
        Self { ends, carrier: Some(carrier) }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
    }
}

fn open(name: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let device =
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(FLAGS).map_err(io::Error::other)?;
    // SAFETY: the request is live and of the layout that the call asks for.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}

/// Carries what has come in at either end, or waits a moment for something to come.
fn carry(devices: &[File; 2], packet: &mut [u8]) {
    let mut waiting = devices.each_ref().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
    let _ = poll(&mut waiting, PollTimeout::from(50_u8));
    for (from, to) in [(&devices[0], &devices[1]), (&devices[1], &devices[0])] {
        let (mut from, mut to) = (from, to);
        while let Ok(length) = from.read(packet) {
            // A link that is down takes nothing, as a wire that is cut.
            let _ = to.write(&packet[..length]);
        }
    }
}
