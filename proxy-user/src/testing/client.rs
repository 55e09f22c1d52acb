//! Clients with real sockets.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::namespace::Namespace;
use super::server::parse_greeting;

/// How long an answer may take. Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// An open TCP connection that was greeted.
pub struct Connection {
    /// The connection.
    pub stream: BufReader<TcpStream>,
    /// The server's name.
    pub server: String,
    /// The client as the server sees it.
    pub seen_as: SocketAddr,
}

/// Connects by TCP from a namespace and reads the greeting.
///
/// # Errors
/// As the socket calls say.
pub fn tcp(from: &Namespace, to: SocketAddr) -> io::Result<Connection> {
    greeted(from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?)
}

/// As [`tcp`], from where the caller is.
///
/// # Errors
/// As the socket calls say.
pub fn tcp_here(to: SocketAddr) -> io::Result<Connection> {
    greeted(TcpStream::connect_timeout(&to, PATIENCE)?)
}

/// As [`tcp`], from a source port.
///
/// # Errors
/// As the socket calls say.
pub fn tcp_from_port(from: &Namespace, to: SocketAddr, port: u16) -> io::Result<Connection> {
    let stream = from.run(|| -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(unspecified(to.is_ipv6()), port).into())?;
        socket.connect(&to.into())?;
        Ok(socket.into())
    })?;
    greeted(stream)
}

/// Whether a connection is refused.
pub fn is_refused(from: &Namespace, to: SocketAddr) -> bool {
    tcp(from, to).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn greeted(stream: TcpStream) -> io::Result<Connection> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (server, seen_as) = parse_greeting(&line);
    Ok(Connection { stream, server, seen_as })
}

impl Connection {
    /// Sends bytes and reads as many back.
    ///
    /// # Errors
    /// As the socket calls say.
    pub fn echo(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        self.stream.get_mut().write_all(bytes)?;
        let mut answer = vec![0; bytes.len()];
        self.stream.read_exact(&mut answer)?;
        Ok(answer)
    }
}

/// An answer by UDP.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Where it came from.
    pub from: SocketAddr,
    /// The server's name.
    pub server: String,
    /// The client as the server sees it.
    pub seen_as: SocketAddr,
    /// What came back of what was sent.
    pub bytes: Vec<u8>,
}

/// An unconnected UDP socket in a namespace.
///
/// # Errors
/// As the socket calls say.
pub fn udp_socket(namespace: &Namespace, v6: bool, port: u16) -> io::Result<UdpSocket> {
    namespace.run(|| udp_socket_here(v6, port))
}

/// As [`udp_socket`], where the caller is.
///
/// # Errors
/// As the socket calls say.
pub fn udp_socket_here(v6: bool, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((unspecified(v6), port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn unspecified(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// Sends a datagram and waits for its answer.
///
/// # Errors
/// As the socket calls say.
pub fn exchange(socket: &UdpSocket, to: SocketAddr, bytes: &[u8]) -> io::Result<Answer> {
    socket.send_to(bytes, to)?;
    let mut buffer = vec![0; 64 * 1024];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let end = buffer.iter().position(|byte| *byte == b'\n').expect("a greeting");
    let (server, seen_as) = parse_greeting(&String::from_utf8_lossy(&buffer[..end]));
    Ok(Answer { from, server, seen_as, bytes: buffer[end + 1..length].to_vec() })
}

/// Sends a datagram from a socket of its own and waits for its answer. The socket is connected, so
/// that an ICMP error shows as "connection refused".
///
/// # Errors
/// As the socket calls say.
pub fn udp(from: &Namespace, to: SocketAddr, bytes: &[u8]) -> io::Result<Answer> {
    from.run(|| udp_here(to, bytes))
}

/// As [`udp`], from where the caller is.
///
/// # Errors
/// As the socket calls say.
pub fn udp_here(to: SocketAddr, bytes: &[u8]) -> io::Result<Answer> {
    let socket = udp_socket_here(to.is_ipv6(), 0)?;
    socket.connect(to)?;
    socket.send(bytes)?;
    let mut buffer = vec![0; 64 * 1024];
    let length = socket.recv(&mut buffer)?;
    let end = buffer.iter().position(|byte| *byte == b'\n').expect("a greeting");
    let (server, seen_as) = parse_greeting(&String::from_utf8_lossy(&buffer[..end]));
    let from = socket.peer_addr()?;
    Ok(Answer { from, server, seen_as, bytes: buffer[end + 1..length].to_vec() })
}

/// Sends an echo request by a datagram ICMP socket and waits for its answer.
///
/// # Errors
/// If none comes in time.
///
/// # Panics
/// If the answer is wrong.
pub fn ping(from: &Namespace, to: IpAddr, patience: Duration) -> io::Result<()> {
    from.sysctl("net/ipv4/ping_group_range", "0 0");
    let (domain, protocol, kind) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, [8, 0]),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, [128, 129]),
    };
    let socket = from.run(|| Socket::new(domain, Type::DGRAM, Some(protocol)))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    let request = [kind[0], 0, 0, 0, 0, 0, 0, 1, b'h', b'i'];
    socket.send(&request)?;
    let mut answer = [0; 64];
    let length = (&socket).read(&mut answer)?;
    assert_eq!((answer[0], &answer[8..length]), (kind[1], &b"hi"[..]));
    Ok(())
}
