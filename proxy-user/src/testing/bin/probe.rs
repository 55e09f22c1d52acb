//! Requests of a node's own process:
//! `portal-probe tcp|udp|connected-udp|only-connected-udp|steady-udp|renewed-udp|held-tcp|crowded ADDRESS [TIMES]`.
//!
//! With only-connected-udp it asks nothing, and prints the peer. With steady-udp it sends a datagram for each line that it reads, all from one socket, and prints the
//! server's name, or `-` if nobody answers in a moment. With renewed-udp that socket is connected, and another one takes its place
//! when a call fails, but not when nothing comes. With held-tcp it opens so many connections to a server that echoes, asks by each for each line, and
//! prints how many are answered. With crowded it connects by TCP and UDP, sends a datagram by so many sockets more, and prints both peers. Otherwise:
//!
//! Prints a line for each: the server's name, the client as the server sees it, and the peer as the
//! socket does. At the first failure it prints its kind on standard error and ends.

use std::env::args;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use portal::testing::client::{exchange, tcp_here, udp_here, udp_socket_here};
use portal::testing::patience;
use portal::testing::server::parse_greeting;

/// How long an answer may take that may not come.
const MOMENT: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    let arguments: Vec<String> = args().collect();
    let (protocol, to, times) = match arguments.as_slice() {
        [_, protocol, to] => (protocol, to, "1"),
        [_, protocol, to, times] => (protocol, to, times.as_str()),
        _ => return usage(),
    };
    let (Ok(to), Ok(times)) = (to.parse(), times.parse::<u32>()) else { return usage() };
    let result = match protocol.as_str() {
        "steady-udp" => steady(to),
        "renewed-udp" => renewed(to),
        "held-tcp" => held(to, times),
        "crowded" => crowded(to, times),
        _ => return probe_often(protocol, to, times),
    };
    result.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

fn probe_often(protocol: &str, to: SocketAddr, times: u32) -> ExitCode {
    for _ in 0..times {
        match probe(protocol, to) {
            Ok(line) => println!("{line}"),
            Err(error) => return fail(&error),
        }
    }
    ExitCode::SUCCESS
}

fn fail(error: &io::Error) -> ExitCode {
    eprintln!("{:?}", error.kind());
    ExitCode::FAILURE
}

fn steady(to: SocketAddr) -> io::Result<()> {
    let socket = udp_socket_here(to.is_ipv6(), 0)?;
    socket.set_read_timeout(Some(MOMENT))?;
    let mut buffer = [0; 512];
    for _ in io::stdin().lines() {
        // Refused or not answered: either is no answer.
        let answer = socket.send_to(b"x", to).and_then(|_| socket.recv(&mut buffer));
        match answer {
            Ok(length) => {
                println!("{}", parse_greeting(&String::from_utf8_lossy(&buffer[..length])).0);
            }
            Err(_) => println!("-"),
        }
    }
    Ok(())
}

fn renewed(to: SocketAddr) -> io::Result<()> {
    let connected = || {
        let socket = udp_socket_here(to.is_ipv6(), 0)?;
        socket.set_read_timeout(Some(MOMENT))?;
        socket.connect(to).map(|()| socket)
    };
    let mut socket = connected()?;
    let mut buffer = [0; 512];
    for _ in io::stdin().lines() {
        match socket.send(b"x").and_then(|_| socket.recv(&mut buffer)) {
            Ok(length) => {
                println!("{}", parse_greeting(&String::from_utf8_lossy(&buffer[..length])).0);
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    socket = connected()?;
                }
                println!("-");
            }
        }
    }
    Ok(())
}

fn held(to: SocketAddr, count: u32) -> io::Result<()> {
    let connect = |_| {
        let stream = TcpStream::connect(to)?;
        stream.set_read_timeout(Some(patience())).map(|()| stream)
    };
    let mut streams = (0..count).map(connect).collect::<io::Result<Vec<_>>>()?;
    for _ in io::stdin().lines() {
        let echoes = |stream: &mut TcpStream| {
            let mut answer = [0];
            stream.write_all(b"?").and_then(|()| stream.read_exact(&mut answer)).is_ok()
        };
        println!("{}", streams.iter_mut().filter_map(|s| echoes(s).then_some(())).count());
    }
    Ok(())
}

fn crowded(to: SocketAddr, count: u32) -> io::Result<()> {
    let stream = TcpStream::connect(to)?;
    let socket = udp_socket_here(to.is_ipv6(), 0)?;
    socket.connect(to)?;
    for _ in 0..count {
        udp_socket_here(to.is_ipv6(), 0)?.send_to(b"x", to)?;
    }
    println!("{} {}", stream.peer_addr()?, socket.peer_addr()?);
    Ok(())
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: portal-probe tcp|udp|connected-udp|only-connected-udp|steady-udp|renewed-udp|held-tcp|crowded ADDRESS [TIMES]"
    );
    ExitCode::from(2)
}

fn probe(protocol: &str, to: SocketAddr) -> io::Result<String> {
    let answer = match protocol {
        "tcp" => {
            let mut connection = tcp_here(to)?;
            connection.echo(b"hello")?;
            let peer = connection.stream.get_ref().peer_addr()?;
            return Ok(format!("{} {} {peer}", connection.server, connection.seen_as));
        }
        "only-connected-udp" => {
            let socket = udp_socket_here(to.is_ipv6(), 0)?;
            socket.connect(to)?;
            return Ok(socket.peer_addr()?.to_string());
        }
        "udp" => exchange(&udp_socket_here(to.is_ipv6(), 0)?, to, b"hello")?,
        _ => udp_here(to, b"hello")?,
    };
    Ok(format!("{} {} {}", answer.server, answer.seen_as, answer.from))
}
